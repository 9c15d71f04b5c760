"""Checkpoints that are damaged, half-written or contended for."""

import errno
import shutil

import pytest
from compare import same_bits, without_timing
from conftest import DAMAGE, FORK, FORKS, ONE, changed_train, flags, launch, train_here

from ft import durable
from ft.errors import UserError

FILES = ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, reviews):
    """A run of 12 updates with a checkpoint every 4th."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(**words(tiny_model, reviews, folder)) == 0
    return folder


def words(model, data, folder):
    return {
        "model_name_or_path": model, "dataset_name": data, "output_dir": folder, "learning_rate": 1e-3,
        "max_train_steps": 12, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5,
        "save_strategy": "steps", "save_steps": 4, "save_total_limit": 50,
    }  # fmt: skip


@pytest.fixture
def config(tiny_model, reviews, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    return words(tiny_model, reviews, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.case(
    "each file of the newest checkpoint cut short, emptied, deleted, or with one bit flipped",
    "passed over with a warning for the one before; the end is bit-identical",
)
def test_a_damaged_file_passes_the_checkpoint_over(config, whole, tmp_path, capfd, name, damage):
    DAMAGE[damage](tmp_path / "run/checkpoints/step-00000012" / name)
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    out = capfd.readouterr().out
    assert "warning: the checkpoint step-00000012 is damaged" in out
    assert name in out or name == "manifest.json"  # a bit of it that names another file
    assert "after update 8" in out
    assert same_bits(whole / "final", tmp_path / "run/final")
    assert without_timing(whole) == without_timing(tmp_path / "run")
    assert (tmp_path / "run/checkpoints/damaged-step-00000012").is_dir()


@pytest.mark.case(
    "all checkpoints damaged",
    "starts anew and says so; they are kept aside",
)
def test_where_all_are_damaged_the_run_starts_anew_and_keeps_them(config, whole, tmp_path, capfd):
    (tmp_path / "run/results.json").unlink()
    for path in (tmp_path / "run/checkpoints").glob("step-*"):
        DAMAGE["cut short"](path / "model.safetensors")
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert "starts anew" in capfd.readouterr().out
    assert same_bits(whole / "final", tmp_path / "run/final")
    assert len(list((tmp_path / "run/checkpoints").glob("damaged-*"))) == 3


@pytest.mark.case(
    "checkpoints that cannot be read for the moment",
    "exit 2 and a message; nothing is renamed, and once they can, the end is bit-identical",
)
def test_what_cannot_be_read_for_the_moment_is_no_damage(config, whole, tmp_path, monkeypatch):
    (tmp_path / "run/results.json").unlink()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def away(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"step-00000012.* cannot be read"):
        patch.setattr(durable, "digest", away)
        train_here(**config, resume_from_checkpoint="latest")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", tmp_path / "run/final")


@pytest.mark.case(
    "SIGKILL while a checkpoint takes the place of one of the same update, the only one",
    "the older is taken up; the end is bit-identical",
)
def test_a_checkpoint_that_was_being_replaced_is_found_again(config, whole, tmp_path, capfd):
    folder = tmp_path / "run/checkpoints"
    for path in folder.glob("step-*"):
        if path.name != "step-00000008":
            shutil.rmtree(path)
    (folder / "step-00000008").rename(folder / ".step-00000008.old")
    (tmp_path / "run/results.json").unlink()
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert "after update 8" in capfd.readouterr().out
    assert same_bits(whole / "final", tmp_path / "run/final")


@pytest.mark.case(
    "a damaged checkpoint named by its path",
    "exit 2; the message names the file",
)
def test_a_checkpoint_named_by_its_path_has_to_be_whole(config, tmp_path):
    place = tmp_path / "run/checkpoints/step-00000008"
    DAMAGE["one bit flipped"](place / "model.safetensors")
    with pytest.raises(UserError, match=r"step-00000008.*model.safetensors is changed"):
        train_here(**config, resume_from_checkpoint=place)


@pytest.mark.case(
    "leftovers of interrupted saves, also under the name that the next save wants",
    "removed; the end is bit-identical",
)
def test_leftovers_of_an_interrupted_save_are_in_nobodys_way(config, whole, tmp_path):
    folder = tmp_path / "run/checkpoints"
    shutil.rmtree(folder / "step-00000012")
    for name in (".step-00000012.tmp", ".step-00000010.tmp", ".step-00000012.old"):
        shutil.copytree(folder / "step-00000004", folder / name)
        DAMAGE["deleted"](folder / name / "state.json")
    (folder / "latest").write_text("step-00000012\n")  # between rename and pointer, in the reverse order
    assert train_here(**config, resume_from_checkpoint="latest") == 0
    assert same_bits(whole / "final", tmp_path / "run/final")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step-00000004", "step-00000008", "step-00000012"]


@pytest.mark.case(
    "`save_total_limit: 1`, the best step long ago",
    "the newest and the best are kept",
)
def test_the_checkpoint_of_the_best_step_is_kept(config, tmp_path):
    words = {
        **config,
        "eval_steps": 4,
        "learning_rate": 1e-12,
        "save_total_limit": 1,
        "output_dir": tmp_path / "b",
    }
    assert train_here(**words) == 0  # the model does not learn, so the first evaluation is the best
    kept = sorted(path.name for path in (tmp_path / "b/checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000012"]


@pytest.mark.case(
    "resumed with more updates, or with fewer than were made",
    "goes on and says so; refused",
)
def test_more_updates_may_be_asked_for_and_fewer_are_refused(config, tmp_path, capfd):
    assert train_here(**{**config, "max_train_steps": 16}, resume_from_checkpoint="latest") == 0
    assert "16 updates instead of 12" in capfd.readouterr().out
    with pytest.raises(UserError, match="is at update 16, but this run has 10"):
        train_here(**{**config, "max_train_steps": 10}, resume_from_checkpoint="latest")


HOLD = "import sys, time; from pathlib import Path; from ft.output import lock_output_dir\n"
HOLD += "lock = lock_output_dir(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"


@pytest.mark.case(
    "a second run on one `output_dir`, and one after the first was killed",
    "refused with exit 2; goes on",
)
def test_a_second_run_on_one_output_dir_is_refused_and_a_dead_one_is_in_nobodys_way(
    config, started, tmp_path
):
    (tmp_path / "hold.py").write_text(HOLD)
    holder = started(ONE, [str(tmp_path / "run")], script=str(tmp_path / "hold.py"))
    assert holder.stdout.readline() == "held\n"
    again = [*flags(**config), "--resume_from_checkpoint", "latest"]
    done = launch(FORK, again)
    assert done.returncode == 2 and "error: output_dir: another run is writing to" in done.stderr
    holder.kill()
    holder.wait()
    done = launch(FORK, again)
    assert done.returncode == 0, done.stderr


# Each process writes its own exit code: the launcher of two always exits with 1.
SLOW_WRITE = """
from pathlib import Path
import ft.saver
from ft.errors import UserError
from ft.run import Run
write, count, leave = ft.saver.write_checkpoint, Run.count, os._exit
def slow(*rest):
    time.sleep(1.5)
    write(*rest)
def failing(self, *rest):
    count(self, *rest)
    if self.progress.step == 4:
        raise UserError("broken on purpose")
def leaving(code):
    Path({place!r}, os.environ["RANK"]).write_text(str(code))
    leave(code)
ft.saver.write_checkpoint, Run.count, os._exit = slow, failing, leaving
"""


@pytest.mark.case(
    "an error of two processes while a checkpoint is being written",
    "exit 2 after the checkpoint stands",
)
def test_an_error_waits_for_the_checkpoint_that_is_being_written(base_flags, tmp_path):
    script = changed_train(tmp_path / "slow.py", SLOW_WRITE.format(place=str(tmp_path)))
    words = flags(**base_flags, save_strategy="steps", save_steps=3)
    done = launch(FORKS, words, script=script)
    assert done.returncode != 0 and "broken on purpose" in done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("*step*")] == ["step-00000003"]
