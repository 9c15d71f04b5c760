"""Small numbers and answers that the processes of a run have in common, exchanged between their hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ft.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

ResultT = TypeVar("ResultT")


class HostGroup:
    """Adds up and gathers small numbers of the processes on their hosts: nobody waits for a device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.num_processes, self.is_main = accelerator.num_processes, accelerator.is_main_process
        self.rank = accelerator.process_index
        on_device = self.num_processes > 1 and torch.distributed.get_backend() != "gloo"
        self._group = torch.distributed.new_group(backend="gloo") if on_device else None

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes, to be called by all of them."""
        if self.num_processes == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(numbers, group=self._group)
        return numbers.tolist()

    def gather(self, *values: float) -> list[list[float]]:
        """The values of each process, by rank, to be called by all of them with as many."""
        places = [[0.0] * len(values) for _ in range(self.num_processes)]
        places[self.rank] = list(values)
        flat = iter(self.sum(*(value for place in places for value in place)))
        return [[next(flat) for _ in values] for _ in places]

    def from_main(self, function: Callable[[], ResultT]) -> ResultT:
        """What a function gives on the main process, the only one that runs it; its `UserError` is raised on
        all."""
        if self.num_processes == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        torch.distributed.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]
