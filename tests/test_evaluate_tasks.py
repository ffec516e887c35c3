"""lm-eval's tasks on our models, from files in a folder: no hub, one pass for all predictors."""

from __future__ import annotations

import json
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import fixture
from lm_eval.api.instance import Instance
from rich.console import Console

from cognica_mlx.decoding.choosing import logprob_of
from cognica_mlx.errors import RequestError
from mlx_poe import generate
from mlx_poe.commands import evaluate as command
from mlx_poe.evaluation import tasks
from mlx_poe.evaluation.answers import Answers, fingerprint
from mlx_poe.evaluation.harness import PredictorLM, Shared, generation_options
from mlx_poe.evaluation.predictors import Predictors, chosen
from mlx_poe.evaluation.tasks import Run, run_tasks

base, tokenizer = fixture("poe-tiny")
BOS = tokenizer.bos_token_id
ROWS = [
    {"country": "France", "choices": [" Paris", " Rome", " Tokyo"], "answer": 0},
    {"country": "Japan", "choices": [" Madrid", " Tokyo", " Oslo"], "answer": 1},
    {"country": "Kenya", "choices": [" London", " Nairobi", " Lima"], "answer": 1},
    {"country": "Peru", "choices": [" Oslo", " Lima", " Rome"], "answer": 1},
]
COMMON = """\
task: NAME
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
fewshot_split: test
doc_to_text: "The capital of {{country}} is"
"""
TASKS = {
    "capitals": """\
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "reading": """\
output_type: loglikelihood_rolling
doc_to_target: "The capital of {{country}} is{{choices[answer]}}. A cat has four legs."
metric_list: [{metric: bits_per_byte}]
""",
    "writing": """\
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks over four documents."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, own in TASKS.items():
        common = COMMON.replace("NAME", name).replace("FILE", str(file))
        (tmp_path / f"{name}.yaml").write_text(common + own)
    return tmp_path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """What datasets and lm-eval keep goes where the test's own files are."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def shared(*names: str, safety: tuple[float, ...] = (), model: Any = None, **more: Any) -> Shared:
    model = model or base
    predictors = Predictors(model, chosen(model, names), safety)
    return Shared(model, tokenizer, predictors, more.pop("longest", 512), **more)


def asked(*arguments: Any, kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def plainly(context: list[int], continuation: list[int]) -> mx.array:
    """Each predictor's log-probability of the continuation's tokens (5, T), by a plain forward."""
    tokens = mx.array([[*context, *continuation]])
    every = [logprob_of(z[0, :-1], tokens[0, 1:]) for z in base.predictions(tokens)]
    return mx.stack(every)[:, len(context) - 1 :]


def test_every_predictor_gets_its_own_answers_from_one_pass():
    one = shared("0", "1", "2", "3", "full")
    said = "The capital of France is"
    requests = asked((said, " Paris"), (said, " Rome"), (said, " Paris Rome"), ("", "Once"))
    for row in range(5):
        found = PredictorLM(one, row).loglikelihood(requests)
        for (context, continuation), (logprob, greedy) in zip(
            [r.args for r in requests], found, strict=True
        ):
            before = tokenizer.encode(context)
            after = tokenizer.encode(context + continuation)[len(before) :]
            plain = plainly(before, after)[row].sum().item()
            assert logprob == pytest.approx(plain, abs=1e-4)
            assert greedy == (continuation == " Paris")
    assert one.scored == 4


def test_a_context_that_is_too_long_loses_its_beginning_and_nothing_is_scored_but_the_rest():
    words = " ".join(f"The capital of {row['country']} is" for row in ROWS)
    one = shared("full", longest=12)
    ((logprob, _),) = PredictorLM(one, 0).loglikelihood(asked((words, " Lima.")))
    before = tokenizer.encode(words)
    after = tokenizer.encode(words + " Lima.")[len(before) :]
    # The last token is not run: 12 are, with BOS.
    kept = [BOS, *before[-(12 - len(after)) :]]
    assert len(kept) + len(after) - 1 == 12
    assert logprob == pytest.approx(plainly(kept, after)[-1].sum().item(), abs=1e-4)
    assert len(one.cut) == 1
    # A continuation is scored in full, even one that is longer than all of it.
    long = " Lima." * 8
    ((logprob, _),) = PredictorLM(one, 0).loglikelihood(asked((words, long)))
    after = tokenizer.encode(words + long)[len(before) :]
    assert len(after) > 13
    assert logprob == pytest.approx(plainly([BOS], after)[-1].sum().item(), abs=1e-4)


def test_a_long_text_is_rolled_through_in_windows_that_begin_with_bos():
    text = "Once upon a time there was a king. " * 3
    tokens = tokenizer.encode(text)[1:]
    (found,) = PredictorLM(shared("full", longest=16), 0).loglikelihood_rolling(
        asked((text,), kind="loglikelihood_rolling")
    )
    # Windows of 15 tokens: the first after BOS, the next ones after BOS and the token before them,
    # the last one after as many as make it full.
    total, at = plainly([BOS], tokens[:15])[-1].sum().item(), 15
    while at < len(tokens):
        end = min(at + 15, len(tokens))
        before = [BOS, *tokens[max(end - 16, 0) : at]]
        total += plainly(before, tokens[at:end])[-1].sum().item()
        at = end
    assert found == pytest.approx(total, abs=1e-3)
    assert PredictorLM(shared("full"), 0).loglikelihood_rolling(
        asked(("",), kind="loglikelihood_rolling")
    ) == [0]


def test_spaces_go_to_the_continuation_and_a_shared_token_to_nobody():
    lm = PredictorLM(shared("full"), 0)
    both = tokenizer.encode("The capital is")
    assert lm.encode_pair("The capital ", "is") == (both[:-1], both[-1:])
    # "cap" and "ital" make one token together: what is scored is encoded by itself, and all of it.
    cap = tokenizer.encode("The cap")
    for rest in ("ital", "ital of France is"):
        assert tokenizer.encode("The cap" + rest)[: len(cap)] != cap
        alone = tokenizer.encode(rest, add_special_tokens=False)
        assert lm.encode_pair("The cap", rest) == (cap, alone)
    with pytest.raises(RequestError, match="empty"):
        lm.encode_pair("The capital", "")


def test_replies_are_those_of_the_modes():
    one = shared("1", "0-2", "full", safety=(0.5,))
    prompts = ["The capital of Peru is", "Once upon a time"]
    given = {"until": ["."], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    modes: list[dict[str, Any]] = [
        {"mode": "stage", "stage": 1},
        {"mode": "compose", "stages": [0, 1, 2]},
        {},
        {"mode": "wand", "safety": 0.5},
    ]
    for row, mode in enumerate(modes):
        requests = asked(*((p, given) for p in prompts), kind="generate_until")
        replies = PredictorLM(one, row).generate_until(requests)
        assert replies == [
            generate(base, tokenizer, p, max_tokens=12, stop=["."], **mode) for p in prompts
        ]
    with pytest.raises(RequestError, match="max_gen_toks 600"):
        requests = asked((prompts[0], {"max_gen_toks": 600}), kind="generate_until")
        PredictorLM(one, 0).generate_until(requests)


def test_generation_is_asked_for_in_our_words():
    assert generation_options({"until": "\n", "temperature": 0.7, "top_p": 0.9}) == {
        "max_tokens": 256,
        "stop": ["\n"],
        "temp": 0.7,
        "top_p": 0.9,
    }
    greedy = generation_options({"do_sample": False, "temperature": 0.7})
    assert greedy == {"max_tokens": 256, "stop": []}
    with pytest.raises(RequestError, match="num_beams"):
        generation_options({"num_beams": 4})
    # Several tasks say it in Hugging Face's words, and that there is one beam.
    assert generation_options({"max_new_tokens": 150, "num_beams": 1}) == {
        "max_tokens": 150,
        "stop": [],
    }
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    for i in range(4):
        given = {name: number for number, name in reversed([*enumerate(names, 1)][i:])}
        assert generation_options({**given, names[0]: given.get(names[0])})["max_tokens"] == i + 1


def test_samples_can_be_repeated_but_differ_from_each_other():
    prompt, given = "Once upon a time", {"temperature": 1.0, "max_gen_toks": 6}
    requests = asked((prompt, given), (prompt, given), kind="generate_until")
    first, again = (PredictorLM(shared("full"), 0).generate_until(requests) for _ in range(2))
    assert first == again and len(set(first)) == 2


def test_samples_stay_the_same_among_other_tasks():
    given = {"temperature": 1.0, "max_gen_toks": 6}
    (first, *again), (_, *among) = (
        PredictorLM(shared("full"), 0).generate_until(asked(*args, kind="generate_until"))
        for args in (
            [("Once upon a time", given), ("The king", given), ("The king", given)],
            [("In winter", given), ("The king", given), ("Once upon a time", given)],
        )
    )
    assert among == [again[0], first]


def test_chat_turns_are_the_specialists_own():
    specialist = fixture("poe-tiny-chat")[0]
    lm = PredictorLM(shared("full", model=specialist, chat=True), 0)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of Japan?"},
    ]
    text = lm.apply_chat_template(messages)
    assert lm.tok_encode(text) == tokenizer.apply_chat_template(messages)
    begun = [*messages, {"role": "assistant", "content": "The"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    whole = tokenizer.apply_chat_template(begun, add_generation_prompt=False)
    assert lm.tok_encode(text) == whole[:-1]
    with pytest.raises(RequestError, match=r"<\|bos\|>"):
        lm.apply_chat_template([{"role": "user", "content": "What is <|bos|>?"}])
    # Without turns a special token's name is text like any other.
    assert BOS not in PredictorLM(shared("full"), 0).tok_encode("a <|bos|>")[1:]


def test_answers_outlive_the_run_and_belong_to_one_model(tmp_path):
    file, requests = tmp_path / "answers.db", asked(("The capital of Peru is", " Lima"))
    prompt = asked(("Once", {"max_gen_toks": 3}), kind="generate_until")
    found = []
    for model in (base, base, fixture("poe-tiny-chat")[0]):
        answers = Answers(file)
        one = shared("full", model=model, answers=answers, fingerprint=fingerprint(model))
        lm = PredictorLM(one, 0)
        found.append((lm.loglikelihood(requests), lm.generate_until(prompt), one.scored))
        answers.close()
    assert [scored for *_, scored in found] == [1, 0, 1]
    assert found[0][:2] == found[1][:2] != found[2][:2]
    (tmp_path / "text").write_text("not a database " * 100)
    with pytest.raises(RequestError, match="text"):
        Answers(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("create table answers (something)")
    with pytest.raises(RequestError, match=r"other\.db"):
        Answers(tmp_path / "other.db")
    answers = Answers(file)
    second = sqlite3.connect(file)
    second.execute("drop table answers")
    second.commit()
    with pytest.raises(OSError, match=r"answers\.db"):
        answers.put("a", 1)


@pytest.mark.parametrize("wrong", ['{"a": 1}', "[1]", "[true, true]", "no JSON", None, b"\xff", 3])
def test_an_answer_of_another_kind_is_made_again(wrong, tmp_path):
    requests = asked(("The capital of Peru is", " Lima"))
    prompt = asked(("Once", {"max_gen_toks": 3}), kind="generate_until")
    found = []
    for _ in range(2):
        answers = Answers(tmp_path / "answers.db")
        lm = PredictorLM(shared("full", answers=answers), 0)
        found.append((lm.loglikelihood(requests), lm.generate_until(prompt)))
        answers.close()
        with sqlite3.connect(tmp_path / "answers.db") as file:
            assert file.execute("update answers set value = ?", (wrong,)).rowcount == 2
    assert found[0] == found[1]


def test_a_fingerprint_sees_every_weight():
    model = fixture("flat-d8")[0]
    before, weight = fingerprint(model), model.h[3].mlp.c_fc.weight
    assert before == fingerprint(model)
    try:
        model.h[3].mlp.c_fc.weight = weight.at[5, 7].add(1e-3)
        assert fingerprint(model) != before
    finally:
        model.h[3].mlp.c_fc.weight = weight


def test_tasks_for_every_predictor_give_what_each_gives_alone(folder, tmp_path, monkeypatch):
    run = Run(list(TASKS), include_path=folder, num_fewshot=1, limit=3)
    one = shared("0", "0-1", "full", safety=(0.5,))
    output = tmp_path / "results"
    output.mkdir()
    found = run_tasks(one, run, "poe-tiny", output, log_samples=True)
    assert list(found) == ["stage 0", "stages 0-1", "full", "wand 0.5"]
    # 3 documents of 3 choices, and 3 texts; none is scored again for another predictor.
    assert one.scored == 12
    bits = {name: r["results"]["reading"]["bits_per_byte,none"] for name, r in found.items()}
    assert len(set(bits.values())) == 4
    alone = run_tasks(shared("0-1"), run, "poe-tiny")["stages 0-1"]
    assert alone["results"] == found["stages 0-1"]["results"]
    for name in ("stage-0", "stages-0-1", "full", "wand-0.5"):
        (file,) = (output / name).rglob("results_*.json")
        content = json.loads(file.read_text())
        assert content["config"]["model_args"]["pretrained"] == "poe-tiny"
        assert content["results"]["capitals"]["sample_len"] == 3
        assert content["n-shot"]["capitals"] == 1
        (samples,) = (output / name).rglob("samples_capitals_*.jsonl")
        assert len(samples.read_text().splitlines()) == 3
    assert sorted(p.name for p in output.iterdir()) == sorted(
        ["stage-0", "stages-0-1", "full", "wand-0.5"]
    )
    # Without lm-eval's own tasks, which take seconds to look through.
    monkeypatch.setattr(tasks, "_Loaded", partial(tasks._Loaded, include_defaults=False))
    with pytest.raises(RequestError, match="nothing_like_it"):
        run_tasks(one, Run(["nothing_like_it"], include_path=folder), "poe-tiny")


def test_the_command_goes_on_where_it_was_ended(folder, tmp_path, capsys, monkeypatch):
    flags = ["--tasks", "capitals,reading", "--include-path", str(folder), "--stages", "0,full"]
    flags += ["--use-cache", str(tmp_path / "answers.db"), "--output", str(tmp_path / "out")]
    put, counts = Answers.put, {"put": 0}

    def until_killed(self: Answers, key: str, value: Any) -> None:
        counts["put"] += 1
        if counts["put"] == 12:
            raise KeyboardInterrupt
        put(self, key, value)

    with monkeypatch.context() as patched:
        patched.setattr(Answers, "put", until_killed)
        assert command.main(flags) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())

    def counted(self: Answers, key: str, value: Any) -> None:
        counts["put"] += 1
        put(self, key, value)

    counts["put"] = 0
    monkeypatch.setattr(Answers, "put", counted)
    file = tmp_path / "result.json"
    assert command.main([*flags, "--json", str(file)]) == 0
    # 12 choices and 4 texts for 2 predictors; 11 answers were there, one of them without its pair.
    assert counts["put"] == 32 - 10
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())["results"]
    assert list(result) == ["stage 0", "full"]
    for name, found in result.items():
        row = next(line for line in printed.splitlines() if line.startswith(f"│ {name}"))
        assert f"{found['capitals']['acc,none']:.4f}" in row
        assert f"{found['reading']['bits_per_byte,none']:.4f}" in row


def test_a_group_shows_its_metrics_or_else_its_members():
    acc = {"alias": "x", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.1}
    found = {
        "results": {"whole": acc, "a": acc, "loose": {"alias": "loose"}, "b": acc, "c": acc},
        "group_subtasks": {"whole": ["a"], "loose": ["whole", "b"], "a": []},
    }
    assert list(command._metrics(found, ["loose"])) == ["whole", "b"]
    assert list(command._metrics(found, ["c", "whole"])) == ["c", "whole"]
    assert list(command._metrics(found, ["a_tag"])) == ["whole", "a", "b", "c"]


def test_a_perplexity_fits_into_its_column_and_no_digit_is_lost(capsys):
    values = {"alias": "x", "sample_len": 4, "perplexity,none": 3.0179e12, "hits,none": 3}
    found = {"full": {"task": {**values, "perplexity_stderr,none": 12.0}}}
    for width in (80, 30):
        Console(width=width).print(command._task_table(found))
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        cells = ["".join(cell).split() for cell in zip(*(r.split("│") for r in rows), strict=True)]
        assert ["".join(cell) for cell in cells[1:-1]] == ["full", "3.018e+12±12.0000", "3.0000"]


def test_nothing_but_the_result_is_printed_on_stdout(folder, capsys):
    # lm-eval prints a line for each metric that it bootstraps.
    (folder / "sure.yaml").write_text(
        (folder / "reading.yaml")
        .read_text()
        .replace("task: reading", "task: sure")
        .replace("loglikelihood_rolling", "loglikelihood")
        .replace("bits_per_byte", "perplexity")
    )
    flags = ["--tasks", "sure", "--include-path", str(folder), "--stages", "full", "--json", "-"]
    assert command.main(flags) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["full"]["sure"]["perplexity,none"] > 1
    assert "bootstrapping" in err


def test_tasks_without_lm_eval_are_refused_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(["--tasks", "capitals"]) == 2
    assert "cognica-mlx[eval]" in capsys.readouterr().err
