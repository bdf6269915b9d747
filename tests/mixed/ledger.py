"""Which ids are issued, over all pods of both kinds: the application's contexts, shared by all of them."""

from collections.abc import Iterable


class Ledger:
    """Who was issued which id, until it is released. An id that is issued while it is, is a double: the
    fixture `fleet` fails a test with one."""

    def __init__(self) -> None:
        self._issued: dict[int, str] = {}
        self.doubles: list[str] = []

    def issue(self, ids: Iterable[int], by: str) -> None:
        for id_ in ids:
            if id_ in self._issued:
                self.doubles.append(
                    f"{id_} (chunk {id_ >> 10}): {by} issued it, and {self._issued[id_]} has it"
                )
            self._issued[id_] = by

    def release(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            self._issued.pop(id_, None)

    def in_use(self, first: int, last: int) -> list[int]:
        """What an SDK pod asks of its application before it issues from a claimed chunk."""
        return [id_ for id_ in range(first, last + 1) if id_ in self._issued]

    def of(self, name: str) -> list[int]:
        """The ids that a pod was issued, under whichever life of its name."""
        return [id_ for id_, by in self._issued.items() if by == name]

    def of_each_chunk(self) -> list[int]:
        """An id of each chunk that anybody has issued from."""
        return list({id_ >> 10: id_ for id_ in self._issued}.values())

    def __len__(self) -> int:
        return len(self._issued)
