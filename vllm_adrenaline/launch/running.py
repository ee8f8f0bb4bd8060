"""The base of what is started and stopped as one: a cluster, or the engines of a supervisor."""

from typing import Self


class Running:
    """A context manager that starts something on entry and stops it at the end, also when the start itself fails."""

    def start(self) -> None:
        """Start everything, or raise."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop everything that runs; may be called again."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
