"""The command line and YAML: what goes where, which value wins, and what a user may type."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import yaml
from conftest import ROOT, flags

from ft.cli import dump, parse
from ft.config import Config, EvalConfig
from ft.errors import UserError
from ft.values import parse_duration

NEEDED = ["--model_name_or_path", "m", "--train_file", "t.csv"]


@pytest.fixture
def config_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model_name_or_path: m\ntrain_file: t.csv\nseed: 7\nlearning_rate: 5e-5\nwarmup_steps: 3\n"
    )
    return str(path)


def config_of(*words):
    return parse(Config, list(words))


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        parse(Config, list(words))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return captured.err


# --- precedence


def test_defaults_then_yaml_then_the_command_line(config_yaml):
    config = config_of(config_yaml, "--seed", "9")
    assert (config.seed, config.warmup_steps, config.weight_decay) == (9, 3, 0.0)
    assert config.learning_rate == 5e-5  # a string to YAML 1.1, a number to us


@pytest.mark.parametrize(
    "order",
    [
        "FILE --seed 9 --torch_compile",
        "--seed 9 FILE --torch_compile",
        "--seed 9 --torch_compile FILE",
        "--config FILE --seed 9 --torch_compile",
        "--seed 9 --torch_compile --config FILE",
        "--seed 9 --torch_compile --config=FILE",
    ],
)
def test_a_config_file_may_stand_anywhere_and_never_has_the_last_word(config_yaml, order):
    config = config_of(
        *(config_yaml if w == "FILE" else w.replace("FILE", config_yaml) for w in order.split())
    )
    assert (config.seed, config.warmup_steps, config.torch_compile) == (9, 3, True)


def test_of_two_config_files_the_later_has_the_last_word(config_yaml, tmp_path):
    other = tmp_path / "other.yml"
    other.write_text("seed: 8\n")
    config = config_of(config_yaml, str(other))
    assert (config.seed, config.warmup_steps) == (8, 3)


def test_of_two_flags_the_later_counts():
    assert config_of(*NEEDED, "--seed", "1", "--seed", "2").seed == 2


def test_a_default_config_file_is_for_no_arguments_or_what_to_do_with_such_a_run(
    config_yaml, tmp_path, capsys
):
    """So the quickstart is resumed by the command that started it. A forgotten config is an error."""
    assert parse(Config, [], defaults=config_yaml).seed == 7
    again = parse(Config, ["--resume_from_checkpoint", "latest"], defaults=config_yaml)
    assert (again.seed, again.resume_from_checkpoint) == (7, "latest")
    assert parse(Config, ["--preflight"], defaults=config_yaml).seed == 7
    with pytest.raises(SystemExit, match="0"):
        parse(Config, ["--print_config"], defaults=config_yaml)
    assert "seed: 7\n" in capsys.readouterr().out
    for words in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest", "--seed", "7"]):
        with pytest.raises(SystemExit, match="2"):
            parse(Config, words, defaults=config_yaml)
        assert "model_name_or_path: is not set" in capsys.readouterr().err
    assert parse(Config, NEEDED, defaults=config_yaml).seed == 42
    (tmp_path / "own.yaml").write_text("model_name_or_path: mine\ntrain_file: mine.csv\n")
    assert parse(Config, [str(tmp_path / "own.yaml")], defaults=config_yaml).seed == 42


# --- what users type


def test_a_flag_alone_is_true_and_a_dash_is_as_good_as_an_underscore():
    config = config_of(*NEEDED, "--torch_compile", "--deterministic", "--allow-pickle", "--seed=5")
    assert config.torch_compile and config.deterministic and config.allow_pickle and config.seed == 5
    assert config_of(*NEEDED, "--torch_compile", "false").torch_compile is False


@pytest.mark.parametrize("words", [["a,b"], ["a", "b"], ["a, b"], ["[a, b]"]])
def test_lists_are_typed_as_one_likes(words):
    config = config_of(*NEEDED, "--text_column_names", *words, "--metrics", *words, "--report_to", *words)
    assert config.text_columns == config.metric_names == config.tracker_names == ["a", "b"]
    assert config.text_column_names == config.metrics == ["a", "b"]  # what encodings are identified by


@pytest.mark.parametrize("value", ["a,b", "[a, b]", "\n- a\n- b", "'a, b'"])
def test_lists_in_yaml(tmp_path, value):
    (tmp_path / "c.yaml").write_text(f"text_column_names: {value}\n")
    assert config_of(*NEEDED, str(tmp_path / "c.yaml")).text_column_names == ["a", "b"]


def test_numbers_may_be_names(tmp_path):
    assert config_of(*NEEDED, "--label_column_name", "1").label_column_name == "1"
    (tmp_path / "c.yaml").write_text("label_column_name: 1\nrun_name: 2024\n")
    config = config_of(*NEEDED, str(tmp_path / "c.yaml"))
    assert (config.label_column_name, config.run_name) == ("1", "2024")


@pytest.mark.parametrize("text", ["~", "#", "#a", "'a'", "Null", "a: b", "|", "12", "true"])
def test_a_text_is_what_was_typed(tmp_path, text):
    """For YAML, ~ and # are null, and quotes are removed."""
    config = config_of(*NEEDED, "--label_delimiter", text, "--slice_columns", f"{text},b")
    assert config.label_delimiter == text and config.slice_names == [text, "b"]
    quoted = json.dumps(text)
    (tmp_path / "c.yaml").write_text(f"label_delimiter: {quoted}\ntext_column_names: {quoted}\n")
    config = config_of(*NEEDED, str(tmp_path / "c.yaml"))
    assert config.label_delimiter == text and config.text_columns == [text]


@pytest.mark.parametrize(
    "text", ["no", "on", "y", "010", "1.10", "0x1F", "11:30:00", "1_000", "2024-01-01", "1e3"]
)
def test_a_text_of_yaml_is_what_stands_there(tmp_path, text):
    """For YAML 1.1 these are false, true, 8, 1.1, 31, 41400 and so on: none of them is a name."""
    (tmp_path / "c.yaml").write_text(
        f"label_column_name: {text}\nmetrics: [{text}, b]\nmodel_revision: {text}\n"
    )
    config = config_of(*NEEDED, str(tmp_path / "c.yaml"))
    assert config.label_column_name == config.model_revision == text and config.metric_names == [text, "b"]


@pytest.mark.parametrize("name", ["\N{GRINNING FACE} text", "Review \x96 text", "a\u2028b", 'say "so"', "[a"])
def test_a_list_that_was_written_is_read_again(tmp_path, name):
    config = config_of(*NEEDED, "--text_column_names", name)
    (tmp_path / "c.yaml").write_text(dump(config), encoding="utf-8")
    assert config_of(str(tmp_path / "c.yaml")).text_columns == [name]


def test_a_number_of_yaml_is_read_as_on_the_command_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("seed: 010\n")
    assert config_of(*NEEDED, str(tmp_path / "c.yaml")).seed == config_of(*NEEDED, "--seed", "010").seed == 10
    (tmp_path / "c.yaml").write_text("max_time: 11:30\n")
    assert "max_time: found '11:30'" in refused(capsys, *NEEDED, str(tmp_path / "c.yaml"))


def test_a_duration_names_its_units(capsys):
    given = {"90": 90, "90s": 90, "45m": 2700, "1h30m": 5400, "11h30m5s": 41405, None: None}
    assert {text: parse_duration("max_time", text) for text in given} == given
    for text in ("1h30", "5m10", "0", "h", "", "9" * 400):  # 1h30 is not an hour and half a minute
        assert f"max_time: found '{text}'" in refused(capsys, *NEEDED, "--max_time", text)


@pytest.mark.parametrize("word", ["--learning_rate 1:30", "--seed 1:30", "--max_train_steps 1:30"])
def test_a_number_has_no_colon(tmp_path, capsys, word):
    """YAML 1.1 reads base 60: 90."""
    name = word.split()[0].removeprefix("--")
    assert f"{name}: found '1:30', expected a" in refused(capsys, *NEEDED, *word.split())
    (tmp_path / "c.yaml").write_text(f"{name}: 1:30\n")
    assert f"{name}: found '1:30', expected a" in refused(capsys, *NEEDED, str(tmp_path / "c.yaml"))


def test_names_in_a_list_keep_their_blanks():
    """As in columns of jsonl or parquet."""
    assert config_of(*NEEDED, "--text_column_names", "[' a', 'b ']").text_columns == [" a", "b "]
    assert config_of(*NEEDED, "--text_column_names", " a, b ").text_columns == ["a", "b"]


@pytest.mark.parametrize("value", ["[a, null]", "[[a], b]", "!!set {a, b}", "!!binary aGk=", "{a: b}"])
def test_a_list_of_yaml_holds_names(tmp_path, capsys, value):
    (tmp_path / "c.yaml").write_text(f"metrics: {value}\n")
    assert "metrics: found" in refused(capsys, *NEEDED, str(tmp_path / "c.yaml"))


def test_null_unsets_what_may_be_unset(tmp_path, capsys):
    assert config_of(*NEEDED, "--save_total_limit", "null").save_total_limit is None
    (tmp_path / "c.yaml").write_text("save_total_limit:\n")
    assert config_of(*NEEDED, str(tmp_path / "c.yaml")).save_total_limit is None
    (tmp_path / "c.yaml").write_text("seed:\n")
    assert "expected a whole number" in refused(capsys, *NEEDED, str(tmp_path / "c.yaml"))


def test_no_is_a_strategy_in_yaml_too(tmp_path):
    (tmp_path / "c.yaml").write_text("eval_strategy: no\nsave_strategy: no\n")
    config = config_of(*NEEDED, str(tmp_path / "c.yaml"))
    assert (config.eval_strategy, config.save_strategy) == ("no", "no")


# --- mistakes


@pytest.mark.parametrize(
    "words, said",
    [
        ("--learning_rat 1", "unknown key 'learning_rat' (command line); did you mean 'learning_rate'"),
        ("--batch_sise 1", "unknown key 'batch_sise'"),
        ("--model m", "unknown key 'model' (command line); did you mean 'model_name_or_path'?"),
        ("--qqqq", "see --help"),
        ("--learn 1", "unknown key 'learn'"),  # no abbreviations: a later flag could change their meaning
        ("--seed", "seed: found no value"),
        ("--seed 1 2", "seed: found 2 values"),
        ("--seed=1 2", "'2' has no flag"),
        ("-x 1", "-x"),
        ("--torch_compile maybe", "torch_compile: found 'maybe'"),
        ("--on_bad_rows dorp", "did you mean 'drop'"),
        ("--seed 1.5", "seed: found '1.5'"),
        ("--overwrite_output_dir stray", "'stray'"),
        ("--save_steps 200", "save_steps: found 200, which does nothing without save_strategy: steps"),
        ("--eval_steps 200", "eval_steps: found 200, which does nothing without eval_strategy: steps"),
        ("--eval_strategy no --eval_steps 200", "eval_steps: found 200, which does nothing"),
        ("--early_stopping_threshold 0.1", "found 0.1, which does nothing without early_stopping_patience"),
        ("--verify --preflight", "verify and preflight are both set"),
        ("--num_train_epochs 1e308", "num_train_epochs: found 1e+308, expected a number up to"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, said):
    message = refused(capsys, *NEEDED, *words.split())
    assert message.startswith("error: ") and said in message


def test_an_unknown_key_of_yaml_is_named_with_its_file(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("seeed: 1\n")
    message = refused(capsys, *NEEDED, str(tmp_path / "c.yaml"))
    assert "'seeed'" in message and "c.yaml" in message and "did you mean 'seed'" in message


def test_a_key_that_stands_twice_in_yaml_is_refused(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("seed: 1\nseed: 2\n")
    assert "seed" in refused(capsys, *NEEDED, str(tmp_path / "c.yaml"))


def test_the_other_processes_of_a_machine_keep_quiet(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        parse(Config, ["--nonsense"])
    assert capsys.readouterr().err == ""


def test_a_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output_dir: ~/runs/a\nresume_from_checkpoint: ~/runs/b\n")
    config = config_of(*NEEDED, str(tmp_path / "c.yaml"))
    assert config.output_dir == str(tmp_path / "runs" / "a")
    assert config.resume_from_checkpoint == str(tmp_path / "runs" / "b")
    assert config_of(*NEEDED, "--resume_from_checkpoint", "latest").resume_from_checkpoint == "latest"


def test_what_is_typed_goes_before_the_other_option_of_a_file_that_would_outrank_it(config_yaml, tmp_path):
    config = config_of(config_yaml, "--warmup_ratio", "0.1")
    assert (config.warmup_steps, config.warmup_ratio) == (None, 0.1)
    (tmp_path / "run.yaml").write_text("max_train_steps: 9\nnum_train_epochs: 3\n")  # as a run leaves it
    config = config_of(*NEEDED, str(tmp_path / "run.yaml"), "--num_train_epochs", "5")
    assert (config.max_train_steps, config.num_train_epochs) == (None, 5)
    assert config_of(*NEEDED, str(tmp_path / "run.yaml")).max_train_steps == 9
    (tmp_path / "mine.yaml").write_text("num_train_epochs: 7\n")
    mine = config_of(*NEEDED, str(tmp_path / "run.yaml"), str(tmp_path / "mine.yaml"))
    assert (mine.max_train_steps, mine.num_train_epochs) == (None, 7)
    both = config_of(*NEEDED, "--max_train_steps", "4", "--num_train_epochs", "5")
    assert (both.max_train_steps, both.num_train_epochs) == (4, 5)


# --- what it prints


@pytest.mark.parametrize("word", ["--print_config", "--help"])
def test_one_process_prints_for_all(capsys, monkeypatch, word):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse(Config, [*NEEDED, word])
    assert stop.value.code == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("config_class", [Config, EvalConfig])
def test_print_config_is_read_back_as_the_same_config(capsys, tmp_path, config_class):
    values = {
        "metrics": "a,b",
        "eval_strategy": "no",
        "warmup_steps": 3,
        "learning_rate": 1e-7,
        "run_name": "null and # void",
    }
    words = [*NEEDED, *flags(**values), "--text_column_names", "[x, y]", "--torch_compile"]
    expected = parse(config_class, words)
    with pytest.raises(SystemExit) as stop:
        parse(config_class, [*words, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    assert parse(config_class, [str(tmp_path / "c.yaml")]) == expected
    assert list(yaml.safe_load(printed)) == list(yaml.safe_load(dump(expected)))


def test_no_turns_the_checkpoints_of_a_config_off(tmp_path):
    (tmp_path / "c.yaml").write_text("save_strategy: steps\nsave_steps: 200\n")
    assert config_of(*NEEDED, str(tmp_path / "c.yaml"), "--save_strategy", "no").save_steps == 200


def test_an_evaluation_takes_the_config_of_a_run_with_what_does_nothing_in_it():
    words = [*NEEDED, "--save_steps", "200", "--eval_steps", "200", "--early_stopping_threshold", "0.1"]
    assert parse(EvalConfig, words).save_steps == 200


@pytest.mark.parametrize("name", ["$SCRATCH/run", "${SCRATCH}/run"])
def test_an_output_dir_with_a_variable_that_no_shell_has_replaced(capsys, monkeypatch, tmp_path, name):
    """Otherwise, a folder named $SCRATCH would be created."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"output_dir: {name}\n")
    said = refused(capsys, *NEEDED, str(tmp_path / "c.yaml"))
    assert "output_dir: found" in said and "is replaced by a shell" in said
    with pytest.raises(UserError, match="is replaced by a shell"):
        EvalConfig(compare="one,two", output_dir=name).check()
    (tmp_path / name).mkdir(parents=True)  # a folder that exists
    assert config_of(*NEEDED, str(tmp_path / "c.yaml")).output_dir == name
    assert config_of(*NEEDED, "--output_dir", "a$").output_dir == "a$"


@pytest.mark.parametrize(
    "metric, is_higher",
    [("mape", False), ("smape", False), ("mase", False), ("my_loss", False), ("error_rate", False),
     ("mean_squared_error", False), ("loss", False), ("accuracy", True), ("r2", True)],
)  # fmt: skip
def test_a_loss_or_an_error_is_better_the_lower_it_is(metric, is_higher):
    assert config_of(*NEEDED, "--metric_for_best_model", metric).higher_is_better is is_higher
    config = config_of(*NEEDED, "--metric_for_best_model", metric, "--greater_is_better")
    assert config.higher_is_better


@pytest.mark.parametrize(
    "value", ["a: b", "true", "1e3", "01", "ä\n", "-x", " padded ", "a,b", "[a]", "{", "@"]
)
def test_dump_keeps_any_text(tmp_path, value):
    config = replace(config_of(*NEEDED), run_name=value, output_dir=value)
    (tmp_path / "c.yaml").write_text(dump(config), encoding="utf-8")
    assert config_of(str(tmp_path / "c.yaml")) == config


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        parse(EvalConfig, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    lines = (ROOT / "ft" / "options.py").read_text().splitlines()
    for field in fields(EvalConfig):
        assert f"--{field.name} " in text
        place = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}:"))
        after = next(line for line in lines[place:] if line.startswith(('    """', "    @")))
        first = after.strip().strip('"').split(".")[0]
        assert len(first) > 8 and " ".join(first.split()) in text, field.name
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    (optimisation,) = [group for group in groups if group.lstrip().startswith("Optimisation")]
    assert "--learning_rate " in optimisation and "default: 5e-05)" in optimisation


def test_neither_help_nor_a_mistake_imports_torch():
    code = (
        "import sys; sys.argv = ['train.py', {word!r}]\n"
        "try:\n    import train\n    train.parse(train.Config)\n"
        "except SystemExit: pass\n"
        "heavy = {{'torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'pandas', 'pyarrow'}}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    for word in ("--help", "--nonsense", "--model_name_or_path=m"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(word=word)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


# --- weights by label


@pytest.mark.parametrize(
    "word, weights",
    [
        ("none", "none"),
        ("null", "none"),
        ("balanced", "balanced"),
        ("good=2,bad = 0.5", {"good": 2, "bad": 0.5}),
        ("a=b=2", {"a=b": 2}),
        ('{"a, b": 2, "1": 3e-1}', {"a, b": 2, "1": 0.3}),
    ],
)
def test_weights_by_label_on_the_command_line(word, weights):
    config = config_of(*NEEDED, "--class_weights", word)
    assert config.weights("class_weights") == weights and config.weights("pos_weight") == "none"


@pytest.mark.parametrize("content", ["{good: 2, bad: 0.5}", '\n  good: 2\n  bad: "0.5"', "good=2,bad=0.5"])
def test_weights_by_label_in_yaml(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(f"model_name_or_path: m\ntrain_file: t.csv\nclass_weights: {content}\n")
    config = config_of(str(path))
    assert config.weights("class_weights") == {"good": 2, "bad": 0.5}
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert config_of(str(again)) == config


def test_labels_that_yaml_would_read_as_something_else_keep_their_names(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model_name_or_path: m\ntrain_file: t.csv\nclass_weights: {yes: 2, 01: 3, 1.0: 4, null: 5}\n"
    )
    assert config_of(str(path)).weights("class_weights") == {"yes": 2, "01": 3, "1.0": 4, "null": 5}


@pytest.mark.parametrize(
    "word, said",
    [
        ("ballanced", "found 'ballanced', expected none, balanced, or weights by label"),
        ("good:2", "expected none, balanced"),
        ("good=2,", "expected none, balanced"),
        ("good=much", "'good' has the weight 'much', expected a finite number above 0"),
        ("good=0", "'good' has the weight '0'"),
        ("good=-1", "above 0"),
        ("good=nan", "finite"),
        ("good=inf", "finite"),
        ("good=1,good=2", "'good' has two weights"),
        ('{"good": 1, "good": 2}', "'good' has two weights"),
        ('{"good": [1]}', "'good' has the weight [1]"),
        ('{"good": 1', "not valid JSON"),
    ],
)
def test_weights_that_are_none(capsys, word, said):
    for key in ("class_weights", "pos_weight"):
        message = refused(capsys, *NEEDED, f"--{key}", word)
        assert message.startswith(f"error: {key}: ") and said in message


def test_a_label_twice_in_a_mapping_of_yaml_is_refused(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\ntrain_file: t.csv\nclass_weights: {good: 2, good: 3}\n")
    assert "'good' has two weights" in refused(capsys, str(path))


def test_an_empty_delimiter_is_refused(capsys):
    assert "label_delimiter" in refused(capsys, *NEEDED, "--label_delimiter", "")
