"""The built-in text that the demonstration's tokenizer is trained on and its prompts are cut from."""

TEXT = """\
A language model answers in two phases. In the first, called prefill, it reads the whole prompt at once; every token \
is multiplied by every weight, and the arithmetic units of the machine are the limit. In the second, called decode, \
it writes one token at a time; for each of them all weights and the whole history of the conversation are read \
again, and the memory of the machine is the limit. A machine that does only the first leaves its memory idle, and a \
machine that does only the second leaves its arithmetic idle. Splitting the phases over two machines keeps them from \
disturbing one another, but it does not remove the imbalance: the prefill machine has gigabytes to spare, while the \
decode machine turns requests away because there is no room for their keys and values.

The keys and values of a request are made on the prefill machine. Usually they are copied to the decode machine at \
once. They need not be. The attention of one decode step reads a great deal of memory and sends very little: one \
query vector per head goes in, one output vector per head comes back. So the history can stay where it was made, and \
the attention over it can be computed there, while the decode machine does everything else. The decode machine then \
holds more requests than its own memory would allow, its matrices are multiplied for larger batches, and the \
bandwidth of the prefill machine is used at last.

In the morning the harbour was grey and quiet. Seven boats lay along the wall, and the eighth was a mile out, \
beating back against the wind with her lamps still lit. The keeper counted them twice, wrote the number in his book, \
and put the kettle on the stove. "She will be in before nine," he said to the cat, who had heard it before. By eight \
o'clock rain was falling on the slates; by nine the boat was at the wall, and eleven crates of herring stood on the \
stones. Nobody asked why she had been late. The sea gives its reasons to those who listen, 1, 2, 3, 4, 5, 6, 7, 8, \
9, 10, and keeps the others to itself.

To bake bread, weigh 500 grams of flour, 350 grams of water, 10 grams of salt and 5 grams of yeast. Mix them until \
no dry flour is left and wait for half an hour. Fold the dough four times, wait again, shape it, and let it rise \
until it is nearly twice its size. Heat the oven to 240 degrees. Bake for 20 minutes under a lid and 20 more \
without; the crust should be dark, and the loaf should sound hollow when it is tapped. def add(a, b): return a + b; \
for i in range(10): print(i, add(i, i * 2)); if x == 0 or y != 1: raise ValueError("no"). What is the time? Who \
wrote this? How many people live in the city? Please explain, in one sentence, what a queue is, and why the longest \
one is always mine.
"""


def words() -> list[str]:
    """Return the words of the text, from which prompts of a wanted length are cut."""
    return TEXT.split()
