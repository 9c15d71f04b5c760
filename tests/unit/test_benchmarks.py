"""The benchmarks: their command line, the arithmetic of their tables, and a round of `throughput`."""

import argparse
import json
import os
import sys
from functools import partial
from itertools import islice
from types import SimpleNamespace
from unittest.mock import patch

import conftest
import pytest
import torch
import yaml
from transformers import AlbertConfig, BertConfig, DebertaV2Config, DistilBertConfig

from benchmarks import accuracy, common, encode, exactness, gpu, growth, memory, start, throughput
from benchmarks.__main__ import COMMANDS, main, parse
from benchmarks.common import (
    Killed,
    check_updates,
    class_file,
    column_flags,
    command_line,
    draw_rows,
    in_turn,
    launch,
    launch_and_weigh,
    logged_steps,
    model_flops,
    rates,
    read_csv,
    round_peaks,
    write_csv,
)
from benchmarks.exactness import dropouts


@pytest.fixture(autouse=True)
def _environment():
    """A command sets variables of its process (threads, devices), which other tests share here."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def model(tmp_path):
    """The options of existing data and model folders; the benchmark's defaults may not be installed."""
    return ["--data", str(tmp_path), "--model", str(tmp_path)]


def test_quick_changes_defaults_alone(model):
    quick = parse(["throughput", "--quick", *model])
    assert (quick.updates, quick.rounds) == (8, 1)
    typed = parse(["throughput", "--quick", "--rounds", "2", "--updates", "12", *model])
    assert (typed.updates, typed.rounds, typed.arms) == (12, 2, quick.arms)
    assert parse(["throughput", *model]).rounds == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_quick_changes_what_the_command_has(command):
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_options(parser)
    assert COMMANDS[command].QUICK.keys() <= {action.dest for action in parser._actions}


@pytest.mark.parametrize(
    "words",
    [
        ["throughput", "--name", "a/b"],
        ["throughput", "--name", "a" * 201],
        ["throughput", "--arms", "ours", "ours"],
        ["throughput", "--updates", "0"],
        ["exactness", "--updates", "1"],
        ["memory", "--rounds", "0"],
        ["encode", "--rows", "1"],
        ["encode", "--", "--seed", "3"],
        ["throughput", "--model", "nosuch/model"],
        ["throughput", "--model", "/nonexistent"],
    ],
)
def test_mistakes_are_said_at_once(words, model, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse([words[0], *model, *words[1:]])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_a_relative_model_folder_is_resolved(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["memory", "--data", ".", "--model", "model"]).model == str(tmp_path / "model")


def test_more_updates_than_full_batches_are_refused(tmp_path):
    check_updates(3, 100, 32, tmp_path)
    with pytest.raises(SystemExit, match="at most 3 with 100 rows"):
        check_updates(4, 100, 32, tmp_path)
    few = f"{tmp_path.name}/train.csv: found 20 training rows, expected at least 32, a batch"
    with pytest.raises(SystemExit, match=few):
        check_updates(1, 20, 32, tmp_path)


def test_scores_become_classes_of_pairs(tmp_path):
    (tmp_path / "train.csv").write_text("sentence1,sentence2,score\na,b,4.6\nc,d,0.2\n")
    path = class_file(tmp_path, "train")
    assert path.read_text().splitlines()[0] == "sentence1,sentence2,label"
    assert read_csv(path) == ([("a", "b"), ("c", "d")], ["5", "0"])
    assert column_flags(path) == {"text_column_names": "sentence1,sentence2"}


@pytest.mark.parametrize(
    "content, found",
    [("", "no rows"), ("text,label\n", "no rows"), ("review,stars\na,5\n", "the columns review, stars")],
)
def test_a_file_without_rows_or_columns_is_said(content, found, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(content)
    with pytest.raises(
        SystemExit, match=f"found {found}, expected text or sentence1 and sentence2, and label"
    ):
        read_csv(path)


def test_numbers_with_fractions_and_blanks_around_labels_are_classes_of_all_arms(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,-0.4\nb, 2.6\nc,3.0\n")
    assert read_csv(class_file(tmp_path, "train")) == (["a", "b", "c"], ["0", "3", "3"])
    (tmp_path / "train.csv").write_text("text,label\na, good\nb,good \nc,1\n")
    assert class_file(tmp_path, "train").read_text().splitlines() == ["text,label", "a,good", "b,good", "c,1"]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"text,label\na,x\n ,y\n", "row 1 has no text"),
        (b"text,label\na\n", "row 0 has no label"),
        (b"text,label\na,x\nI like it, really,y\n", "row 1 has more fields than the header"),
        (b"text,score\na,high\n", "column score: could not convert string to float: 'high'"),
        (b"text,label\n\xff,x\n", "is not UTF-8"),
    ],
)
def test_what_train_py_would_refuse_is_refused_at_once(content, said, tmp_path):
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=said):
        class_file(tmp_path, "train")


def test_a_text_may_be_a_book(tmp_path):
    (tmp_path / "train.csv").write_text(f"text,label\n{'a ' * 100_000},x\n")
    assert len(read_csv(tmp_path / "train.csv")[0][0]) == 200_000


def write_texts(folder, names, text="words"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_class_folders_are_read_where_there_is_no_csv(tmp_path, monkeypatch):
    """The second of every five texts of a class is for testing, so a class of one text is in train.csv."""
    write_texts(tmp_path / "data", [f"good/{number}.txt" for number in range(7)])
    write_texts(tmp_path / "data", ["bad/0.txt", "rare/0.txt", "bad/1.txt", ".git/0.txt"])
    monkeypatch.chdir(tmp_path)
    made = common.data_folder("data")
    assert made.name == tmp_path.name
    assert read_csv(made / "train.csv")[1] == ["bad", *["good"] * 5, "rare"]
    assert read_csv(made / "test.csv")[1] == ["bad", "good", "good"]
    (tmp_path / "data/train.csv").write_text("text,label\na,x\n")
    common.data_folder.cache_clear()
    assert common.data_folder("data") == tmp_path / "data"


def test_blank_texts_of_class_folders_are_left_out_and_counted(tmp_path, capsys):
    write_texts(tmp_path, ["good/0.txt", "good/1.txt", "bad/1.txt"])
    write_texts(tmp_path, ["bad/0.txt", "good/2.txt"], text=" \n")
    made = common.data_folder(str(tmp_path))
    assert read_csv(made / "train.csv")[1] == ["bad", "good"] and read_csv(made / "test.csv")[1] == ["good"]
    assert f"{tmp_path}: 2 blank .txt file(s) left out" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["a/0.txt", "a/1.txt"], ["a/readme.txt", "b/readme.txt"]])
def test_a_folder_with_texts_of_one_class_or_a_note_in_each_of_its_folders_holds_no_train_csv(
    names, tmp_path
):
    write_texts(tmp_path, names)
    with pytest.raises(SystemExit, match=f"{tmp_path} holds no train.csv"):
        class_file(common.data_folder(str(tmp_path)), "train")


def test_a_flag_that_the_command_sets_is_refused():
    assert command_line({"seed": 3}, ["--freeze", "all"]) == ["--seed", 3, "--freeze", "all"]
    assert command_line({"seed": 3}, ["--seed", "4"], free=["seed"]) == ["--seed", 3, "--seed", "4"]
    for typed in (["--max_length", "9"], ["--max-length=9"]):
        with pytest.raises(SystemExit, match="--max_length cannot follow --"):
            command_line({"seed": 3, "max_length": 8}, typed)
    for typed in ("--num_seeds", "--preflight", "--verify"):
        with pytest.raises(SystemExit, match=f"{typed} cannot follow --: what is measured is one run"):
            command_line({"seed": 3}, [typed, "2"])


def test_a_round_has_rows_of_its_own_and_another_first_arm(tmp_path, reviews):
    whole = list(zip(*read_csv(reviews / "train.csv"), strict=True))
    first, same, other = (
        list(zip(*read_csv(draw_rows(reviews / "train.csv", 64, seed, tmp_path)), strict=True))
        for seed in (42, 42, 43)
    )
    assert len(first) == 64 and set(first) <= set(whole)
    assert first == same != other
    assert [in_turn(["a", "b", "c"], number) for number in (0, 1, 5)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_drawn_rows_have_two_classes_where_the_file_has(tmp_path):
    labels = ["rare", *["common"] * 99]
    write_csv(tmp_path / "all.csv", [f"text {row}" for row in range(100)], labels)
    for seed in range(5):
        drawn = read_csv(draw_rows(tmp_path / "all.csv", 10, seed, tmp_path))[1]
        assert len(drawn) == 10 and sorted(set(drawn)) == ["common", "rare"]


def test_a_folder_for_tables_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "file")
    with pytest.raises(SystemExit, match=r"file: no table can be written there: File exists"):
        common.check_results()


def test_all_arms_take_one_device(monkeypatch):
    for found, left in ((None, "0"), ("2,3", "2"), ("", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", found or "")
        if found is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        common.one_device()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    common.one_device()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert common.device().type == "cpu" and os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    "command, module, step, left", [("memory", memory, "run", None), ("gpu", gpu, "gemm_peak", "bf16")]
)
def test_a_command_has_no_precision_but_its_own(command, module, step, left, model, monkeypatch, capsys):
    def told(*_, **__):
        sys.exit(f"precision {os.environ.get('ACCELERATE_MIXED_PRECISION')}")

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "make_model", lambda *_: "")
    monkeypatch.setattr(module, step, told)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    folders = model if command == "memory" else ["--tokenizer", model[1]]
    with pytest.raises(SystemExit, match=f"precision {left}"):
        main([command, *folders])
    assert "ACCELERATE_MIXED_PRECISION=fp16 is left out" in capsys.readouterr().err


def test_exactness_is_of_the_cpu_alone_whatever_there_is(tiny_model, reviews, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the GPU")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert common.machine()["accelerator"] == "the GPU"
    monkeypatch.setattr(exactness, "gemm_peak", lambda: sys.exit(f"peak of the {common.device()}"))
    options = parse(["exactness", "--data", str(reviews), "--model", str(tiny_model), "--updates", "2"])
    with pytest.raises(SystemExit, match="peak of the cpu"):
        exactness.run(options)
    assert common.machine()["accelerator"] is None


@pytest.mark.parametrize("program", ["pass", "import os; os.kill(os.getpid(), 15)"])
def test_a_run_that_was_over_before_it_could_be_stopped_asks_for_more_updates(program, tmp_path):
    with pytest.raises(SystemExit, match="--updates: the run was over before it could be stopped after upd"):
        exactness._stop_half_way(["-c", program], tmp_path, 4)


def test_rows_to_encode_are_of_two_classes_though_a_file_begins_with_one(tmp_path, monkeypatch):
    def told(*words):
        sys.exit(" ".join(read_csv(json.loads(words[-1])["path"])[1]))

    write_csv(tmp_path / "train.csv", ["one", "two", "three", "four"], ["x", "x", "x", "y"])
    monkeypatch.setattr(encode, "gemm_peak", lambda: 100.0)
    monkeypatch.setattr(encode, "launch_and_weigh", told)
    with pytest.raises(SystemExit, match=r"^a b a$"):
        encode.run(parse(["encode", "--data", str(tmp_path), "--model", str(tmp_path), "--rows", "3"]))


def test_peers_take_what_train_py_takes(tiny_model, tmp_path):
    """A tokenizer without a padding token or with token types that the model lacks, a head of another size, a
    model of scores."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from benchmarks import peers

    trained = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=5, problem_type="regression", type_vocab_size=1, ignore_mismatched_sizes=True
    )
    trained.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    config, loaded = peers.load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "[SEP]" and "token_type_ids" not in loaded("a", "b")
    network = peers.load_model(str(tmp_path), config, 3)
    batch = loaded([("one", "two"), ("three", "four five")], padding=True, return_tensors="pt")
    assert network(**batch, labels=torch.tensor([0, 2])).logits.shape == (2, 3)


def test_only_the_memory_of_what_was_started_is_weighed():
    """This process has held more than the first, and the second's child more than itself."""
    big = b"x" * 300_000_000
    del big
    printed, peak = launch_and_weigh("-c", "print('one'); print('two', end='')")
    assert printed.splitlines() == ["one", "two"]
    assert peak < 100_000_000
    child = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'b\"x\" * 200_000_000'])"
    assert 200_000_000 < launch_and_weigh("-c", child)[1] < 300_000_000
    with pytest.raises(SystemExit, match=r"(?s)failed:.*told"):
        launch_and_weigh("-c", "import sys; sys.exit('told')")


def test_nominal_operations(tiny_model):
    """Two layers of 32: four matrices of 32 x 32 and two of 32 x 64; texts of 3 and of 7 tokens."""
    assert model_flops(str(tiny_model), 10, 58) == 6 * 2 * 8192 * 10 + 12 * 2 * 32 * 58


def test_layers_that_share_their_weights_count_as_often_as_they_are_used(tmp_path):
    sizes = {"hidden_size": 32, "embedding_size": 8, "intermediate_size": 64, "num_attention_heads": 2}
    AlbertConfig(**sizes, vocab_size=50, num_hidden_layers=3).save_pretrained(tmp_path)
    assert model_flops(str(tmp_path), 1, 0) == 6 * (3 * 8192 + 8 * 32)


def test_a_table_of_distances_that_a_matrix_multiplies_counts_as_no_token(tmp_path):
    """DeBERTa's, multiplied by the matrices of queries and keys, which count once."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    for options in ({}, relative, relative | {"share_att_key": True}):
        DebertaV2Config(**sizes, **options, vocab_size=50).save_pretrained(tmp_path)
        assert model_flops(str(tmp_path), 1, 0) == 6 * 2 * 8192


@pytest.mark.parametrize(
    "config, names",
    [
        (AlbertConfig, {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"}),
        (DistilBertConfig, {"dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"}),
    ],
)
def test_without_dropout_is_without_any(tmp_path, config, names):
    config().save_pretrained(tmp_path)
    assert set(dropouts(str(tmp_path))) == names


def test_an_arm_that_is_killed_is_left_out_of_the_table_which_says_so(tmp_path, monkeypatch, capsys):
    options = argparse.Namespace(rounds=2, arms=["ours", "tutorial"], extra=[], name=None, updates=1)
    saved, step = [], {"seconds": 1.0, "waited": 0.0, "tokens": 9, "positions": 9, "rows": 3, "squares": 27}

    def rounds(options, number):
        for arm in list(options.arms):
            yield arm, None if arm == "tutorial" else {"steps": [step], "peak_bytes": 10}

    monkeypatch.setattr(throughput, "one_round", rounds)
    monkeypatch.setattr(throughput, "gemm_peak", lambda: 1.0)
    monkeypatch.setattr(throughput, "save", lambda options, text, *_: saved.append(text))
    throughput.measure(options, lambda options, measured, gemm: ", ".join(measured))
    for text in saved:
        assert text.startswith("ours\n") and text.endswith(f"left out: {throughput.ARMS['tutorial']}.")
    assert len(saved) == 2
    with pytest.raises(Killed, match="out of memory"):
        launch("-c", "import os; os.kill(os.getpid(), 9)")


def test_the_peak_of_a_round_is_the_higher_of_its_samples():
    assert round_peaks([3, 1, 2, 5]) == [3, 2, 5]


def test_steps_and_rates_of_a_log():
    row = {
        "perf/examples_per_second": 16.0,
        "perf/tokens_per_second": 500.0,
        "perf/padding_share": 0.2,
        "perf/data_wait_share": 0.01,
    }
    step = {"seconds": 2.0, "waited": 0.02, "tokens": 1000, "positions": 1250, "rows": 32}
    assert logged_steps([row], 32) == [step]
    found = rates([step, step | {"tokens": 500}])
    assert (found["seconds"], found["tokens"], found["positions"]) == (4, 1500, 2500)
    assert (found["tokens_per_second"], found["examples_per_second"]) == (375, 16)
    assert found["padding"] == pytest.approx(0.4)


def test_tokens_of_a_run_are_those_of_its_plan():
    """Seven rows in updates of four: 4 + 3, and 4 of the second epoch, logged after two updates and at the
    end."""
    lengths = [3, 1, 4, 1, 5, 9, 2]
    whole = list(islice(common.planned_lengths(lengths, 4, seed=1), 4))
    assert [len(update) for update in whole] == [4, 3, 4, 3]
    assert sorted([*whole[0], *whole[1]]) == sorted([*whole[2], *whole[3]]) == sorted(lengths)

    third = int(whole[2].sum())
    first_log = {"step": 2, "data/tokens": 25, "perf/padding_share": 0.5}
    logs = [first_log, {"step": 2, "eval/loss": 1.0}]
    logs += [{"step": 3, "data/tokens": 25 + third, "perf/padding_share": 0.0}]
    assert accuracy._counts(logs, lengths, seed=1, batch=4) == {
        "tokens": 25 + third,
        "squares": 9 + 1 + 16 + 1 + 25 + 81 + 4 + int((whole[2] ** 2).sum()),
        "positions": 50 + third,
    }
    logs[-1]["data/tokens"] += 1
    with pytest.raises(SystemExit, match=f"{26 + third} tokens logged, {25 + third} planned"):
        accuracy._counts(logs, lengths, seed=1, batch=4)


def test_what_the_collator_counts(tokenizer):
    from transformers import DataCollatorWithPadding

    from benchmarks.peers import counting

    counts = []
    collate = counting(DataCollatorWithPadding(tokenizer), counts)
    batch = collate([{"input_ids": [2, 5, 3]}, {"input_ids": [2, 5, 6, 7, 3]}])
    assert batch["input_ids"].shape == (2, 5)
    assert counts == [{"tokens": 8, "squares": 9 + 25, "positions": 10, "rows": 2}]


def test_the_trainer_groups_as_in_an_epoch_of_all_rows():
    from benchmarks.peers import MixedTrainer

    lengths = [(7 * number) % 320 for number in range(320)]  # each once
    run = SimpleNamespace(
        args=SimpleNamespace(train_batch_size=32, seed=3),
        train_dataset={"input_ids": [[0] * length for length in lengths]},
    )

    def spread_in_batches(rows_of_epoch):
        run.rows_of_epoch = rows_of_epoch
        order = MixedTrainer._get_train_sampler(run)
        assert sorted(order) == list(range(320))
        parts = [[lengths[row] for row in order[begin : begin + 32]] for begin in range(0, 320, 32)]
        return max(max(part) - min(part) for part in parts)

    # Of ten batches of 32, the Trainer sorts two at a time; of two hundred, it would sort 50.
    assert spread_in_batches(320) > 100
    # (The longest row is swapped with that of the first batch, which is then the longest, too.)
    assert spread_in_batches(6400) == 31


def test_the_updates_that_count_have_the_same_rows_in_all_arms_of_a_round(
    tiny_model, reviews, tmp_path, monkeypatch
):
    folders = ["--data", str(reviews), "--model", str(tiny_model)]
    words = "--max_length 64 --updates 6 --rounds 1 --name table --arms ours trainer trainer_defaults plain"
    words += " tutorial ours_two"
    options = parse(["throughput", *folders, *words.split()])
    found = dict(throughput.one_round(options, 0))
    sums = [
        [sum(step[key] for step in one["steps"]) for key in ("rows", "tokens", "squares")]
        for one in found.values()
    ]
    assert all(one == sums[0] for one in sums)
    assert sums[0][0] == 6 * 32

    monkeypatch.setattr(throughput, "one_round", lambda *_: found.items())
    monkeypatch.setattr(throughput, "gemm_peak", lambda: 100.0)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    throughput.run(options)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[4:10]] == [f"| {throughput.ARMS[arm]}" for arm in found]
    assert {line.count(" | ") for line in lines[2:10]} == {7}
    memory.run(options)
    heads = ["real tokens/s", "min to max", "padding", "% of the GEMM peak", "peak memory, MB"]
    about = [
        f"torch {torch.__version__}",
        " cores, ",
        " threads, ",
        "BLAS ",
        "commit ",
        "100 GFLOP/s (100 to ",
    ]
    for text in ("\n".join(lines), whole := (tmp_path / "table.md").read_text()):
        assert all(words in text for words in [*heads, *about]), text
    assert "MB, median" in whole


def once(function):
    """The function, cached by its arguments."""
    answers = {}

    def call(*words):
        if str(words) not in answers:
            answers[str(words)] = function(*words)
        return answers[str(words)]

    return call


@pytest.mark.parametrize(
    "words",
    [
        "start --rounds 1",
        "encode --rows 300 --rounds 1",
        "evaluation --rounds 1 --repeats 2",
        "save --rounds 1",
        "accuracy --epochs 1 --seeds 1 --max_length 64",
        "growth --updates 300 --evaluated 20 --planned 5000",
    ],
)
def test_a_command_measures_and_leaves_its_table(words, tiny_model, reviews, tmp_path, monkeypatch):
    command, *more = words.split()
    if command not in ("start", "save"):
        more += ["--data", str(reviews), "--model", str(tiny_model)]
    recipe = {"model_name_or_path": str(tiny_model), "train_file": str(reviews / "train.csv")}
    recipe |= {"max_length": 64, "global_batch_size": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(start, "RECIPE", str(tmp_path / "recipe.yaml"))
    monkeypatch.setattr("transformers.BertConfig", partial(BertConfig, hidden_size=48, num_hidden_layers=2))
    for name in ("_ours", "_bare", "_whole"):  # in two rounds
        monkeypatch.setattr(start, name, once(getattr(start, name)))
    monkeypatch.setattr(growth, "WARM_UP", 100)  # two logs come after it
    monkeypatch.setattr(COMMANDS[command], "gemm_peak", lambda: 100.0)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with common.own_cache(tmp_path / "cache"):
        COMMANDS[command].run(parse([command, *more, "--name", "table"]))
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(f"# {command}\n") and "100 GFLOP/s" in text and "nan" not in text
    assert json.loads((tmp_path / "table.json").read_text())["measured"]


def test_exactness_finds_no_difference_between_launches_of_train_py(
    tiny_model, reviews, tmp_path, monkeypatch
):
    """Two of its launches, as forks; the whole command takes minutes."""

    def forked(script, *words, variables):
        done = conftest.launch(conftest.FORK, words, script=script)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one, micro = "1 x 32", "1 x 8, accumulation 4"
    monkeypatch.setattr(exactness, "ARMS", {"ours": exactness.ARMS["ours"]})
    monkeypatch.setattr(exactness, "LAUNCHES", {name: exactness.LAUNCHES[name] for name in (one, micro)})
    monkeypatch.setattr(exactness, "launch", forked)
    monkeypatch.setattr(exactness, "gemm_peak", lambda: 100.0)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    folders = ["--data", str(reviews), "--model", str(tiny_model)]
    words = "--updates 6 --max_length 64 --dropout with --name table"
    exactness.run(parse(["exactness", *folders, *words.split()]))
    measured = json.loads((tmp_path / "table.json").read_text())["measured"]
    assert [len(measured[f"ours, True, {name}"]["steps"]) for name in (one, micro)] == [6, 6]
    found = measured[f"ours, True, {micro}"]
    assert found["loss_difference"] < 1e-5 and 0 < found["weights_difference"] < 1e-4
    assert f"| train.py | {micro} | 1.000 x | 1.000 x |" in (tmp_path / "table.md").read_text()
