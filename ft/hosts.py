"""Small numbers and answers that the processes of a run share, exchanged between the hosts' CPUs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ft.errors import UserError, first_line, tell

if TYPE_CHECKING:
    from accelerate import Accelerator

ResultT = TypeVar("ResultT")
# How long one process waits for another, which may be encoding, writing a checkpoint or uploading a model:
# torch's 10 minutes on GPUs would end the run meanwhile. A hanging loop is the watchdog's (hang_timeout).
PATIENCE = timedelta(hours=6)


class HostGroup:
    """Sums and gathers small numbers of the processes on the host side: nobody waits for a device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.num_processes, self.is_main = accelerator.num_processes, accelerator.is_main_process
        self.rank = accelerator.process_index
        on_device = self.num_processes > 1 and torch.distributed.get_backend() != "gloo"
        self._group = _host_group() if on_device else None

    def say(self, text: str) -> None:
        """Print a line for the user, once."""
        if self.is_main:
            tell(text)

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes, to be called by all of them."""
        if self.num_processes == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(numbers, group=self._group)
        return numbers.tolist()

    def gather(self, *values: float) -> list[list[float]]:
        """The values of each process, by rank; to be called by all of them with equally many."""
        places = [[0.0] * len(values) for _ in range(self.num_processes)]
        places[self.rank] = list(values)
        flat = iter(self.sum(*(value for place in places for value in place)))
        return [[next(flat) for _ in values] for _ in places]

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise `UserError` on all processes if one was given another value than the first: on several hosts,
        each is launched by a command of its own."""
        digests = [hashlib.sha256(json.dumps(value, default=str).encode()) for value in values.values()]
        ranks = self.gather(*(int(digest.hexdigest()[:12], 16) for digest in digests))  # exact in 64 bits
        for place, (name, value) in enumerate(values.items()):
            for rank, numbers in enumerate(ranks):
                if numbers[place] != ranks[0][place]:
                    raise UserError(
                        f"{name}: process {rank} of {self.num_processes} differs from process 0 (here it is "
                        f"{str(value)[:200]}); launch all with the same config, data and model."
                    )

    def from_main(self, function: Callable[[], ResultT]) -> ResultT:
        """The result of a function that only the main process runs; its `UserError` is raised on all."""
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


def _host_group() -> Any:
    """A process group for the hosts' CPUs, beside that of the devices."""
    try:
        return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise UserError(
            "the hosts cannot reach each other by the network that gloo chose: set GLOO_SOCKET_IFNAME to the "
            f"interface that joins them (eth0, ib0). It said: {first_line(error)}"
        ) from None
