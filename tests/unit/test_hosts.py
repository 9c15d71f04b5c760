"""What the processes of a run share."""

import pytest

from ft.errors import UserError
from ft.hosts import HostGroup


@pytest.mark.parametrize("rank", [0, 1])
def test_another_value_on_one_process_is_named_on_all(rank):
    """On several hosts, each is launched by a command of its own."""
    group = object.__new__(HostGroup)
    group.num_processes = 2
    values = {"seed": 3, "data": "abc"}
    group.gather = lambda *numbers: [list(numbers), list(numbers)]
    group.check_same(values)
    group.gather = lambda *numbers: [list(numbers), [numbers[0], numbers[1] + 1]]
    with pytest.raises(UserError, match=r"data: process 1 of 2 differs from process 0 .*'?abc"):
        group.check_same(values)
