"""What is started and stopped as one."""

from typing import Self


class Running:
    """A context manager: started on entry, stopped at the end, and also when the start itself fails."""

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
