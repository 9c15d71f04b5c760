"""What goodput.py has measured stays below the table of faults when that is regenerated."""

import json

from fault_table import with_goodput

SEEN = {
    "seconds": 600.4, "kills": 5, "save_steps": 25, "updates": 1234, "goodput": 0.877, "cores": 2,
    "seconds_per_update": 0.42, "restart_seconds": [8.0, None, 9.5, 8.5], "date": "2026-01-02",
}  # fmt: skip


def test_goodput_stands_once_under_the_table(tmp_path):
    assert with_goodput("table\n", tmp_path) == "table\n"
    (tmp_path / "goodput.json").write_text(json.dumps(SEEN))
    text = with_goodput("table\n", tmp_path)
    assert text.startswith("table\n\n## Goodput\n")
    assert "| 10.0 | 5 | 1,234 | 87.7 % | 8.5 s (9.5 at most) |" in text
    assert with_goodput(text, tmp_path) == text
