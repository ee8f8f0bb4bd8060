"""Stream one completion from the proxy: `adrenaline up MODEL --port 8000`, then `python examples/completion.py`."""

import sys

from openai import OpenAI


def main(url: str = "http://127.0.0.1:8000/v1") -> None:
    """Print a completion as it comes."""
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    for chunk in client.completions.create(model=model, prompt="Once upon a time", max_tokens=64, stream=True):
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
