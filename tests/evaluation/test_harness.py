from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks._index import TaskIndex
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.data.sources import Document
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.cloze import make_cloze, write_cloze_task
from lowrank_kit.evaluation.harness import TaskScore, run_tasks

Build = Callable[..., LlamaForCausalLM]
NUM_ROWS = 24


@pytest.fixture(scope="module")
def rows(tiny_texts: list[str]) -> list[dict[str, Any]]:
    documents = [Document(str(index), text * 4) for index, text in enumerate(tiny_texts)]
    return make_cloze(documents, num_items=NUM_ROWS, context_chars=60)


@pytest.fixture(scope="module")
def task_folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "here"
    write_cloze_task(folder, rows, "tiny_cloze")
    # Moved after it was written: a task folder does not depend on where it lies.
    return folder.rename(folder.with_name("moved"))


@pytest.fixture(scope="module")
def scores(tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, task_folder: Path) -> dict[str, TaskScore]:
    found = run_tasks(tiny_llama(), tiny_tokenizer, ["tiny_cloze"], include_path=task_folder)
    return {score.metric: score for score in found}


def choice_nats(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, choice: str) -> float:
    """ln p(choice | context), alone in its batch, in float64. White space before a choice is part of the choice."""
    ids = torch.tensor([tokenizer.encode(context + choice)])
    first = len(tokenizer.encode(context.rstrip()))
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[0, :-1]
    return float(log_p.gather(1, ids[0, 1:, None])[first - 1 :].sum())


def test_lm_eval_scores_what_a_direct_computation_does(
    scores: dict[str, TaskScore],
    tiny_llama: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
) -> None:
    model = tiny_llama()
    right = right_per_character = 0
    for row in rows:
        nats = [choice_nats(model, tiny_tokenizer, row["context"], choice) for choice in row["choices"]]
        lengths = [len(choice) for choice in row["choices"]]
        right += max(range(4), key=lambda index: nats[index]) == row["label"]
        right_per_character += max(range(4), key=lambda index: nats[index] / lengths[index]) == row["label"]
    assert 0 < right < NUM_ROWS
    assert scores["acc"].value == right / NUM_ROWS
    assert scores["acc_norm"].value == right_per_character / NUM_ROWS


def test_the_standard_error_of_an_accuracy_is_the_closed_form(scores: dict[str, TaskScore]) -> None:
    assert list(scores) == ["acc", "acc_norm"]
    for score in scores.values():
        assert (score.task, score.num_docs) == ("tiny_cloze", NUM_ROWS)
        assert score.stderr == pytest.approx(math.sqrt(score.value * (1 - score.value) / (NUM_ROWS - 1)), rel=1e-12)


def test_repeated_runs_give_the_same_digits_and_stdout_stays_empty(
    scores: dict[str, TaskScore],
    tiny_llama: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # A command that was run before may have set the level.
    environment, level = dict(os.environ), logging.getLogger("lm_eval").level
    model = tiny_llama().train()
    again = run_tasks(model, tiny_tokenizer, ["tiny_cloze", "tiny_cloze"], include_path=task_folder)
    assert again == list(scores.values())
    assert capfd.readouterr().out == ""
    # Nothing is left changed: not the training mode, not the logging, not the environment.
    assert model.training
    assert logging.getLogger("lm_eval").level == level
    assert dict(os.environ) == environment


def test_a_limit_scores_the_first_documents(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    found = run_tasks(tiny_llama(), tiny_tokenizer, ["tiny_cloze"], include_path=task_folder, limit=5)
    assert [score.num_docs for score in found] == [5, 5]


def test_groups_filters_and_bootstrapped_metrics(
    tiny_llama: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(task_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "group.yaml").write_text(
        "group: both\ntask: [tiny_cloze, tiny_median]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    (tmp_path / "median.yaml").write_text(
        "include: tiny_cloze.yaml\ntask: tiny_median\n"
        "filter_list: [{name: first, filter: [{function: take_first}]}]\n"
        "metric_list: [{metric: acc, aggregation: median, higher_is_better: true}]\n"
    )
    found = run_tasks(tiny_llama(), tiny_tokenizer, ["both"], include_path=tmp_path, limit=9)
    by_key = {(score.task, score.metric): score for score in found}
    assert set(by_key) == {
        ("tiny_cloze", "acc"),
        ("tiny_cloze", "acc_norm"),
        ("tiny_median", "acc,first"),
        ("both", "acc"),
        ("both", "acc,first"),
    }
    # A median has no closed form: its standard error comes from lm-eval's bootstrap, which prints.
    assert by_key["tiny_median", "acc,first"].stderr is not None
    captured = capfd.readouterr()
    assert "bootstrapping" in captured.err
    assert captured.out == ""
    assert by_key["both", "acc"].value == by_key["tiny_cloze", "acc"].value


def test_a_model_with_nan_is_refused_by_name(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(LowRankError, match=f"{4 * NUM_ROWS} of the {4 * NUM_ROWS} .* LlamaForCausalLM are not finite"):
        run_tasks(model, tiny_tokenizer, ["tiny_cloze"], include_path=task_folder)


def test_a_choice_longer_than_the_context_is_refused(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    with pytest.raises(LowRankError, match=r"a choice of the task has \d+ tokens, and .* has a context of 1"):
        run_tasks(tiny_llama(max_position_embeddings=1), tiny_tokenizer, ["tiny_cloze"], include_path=task_folder)


def test_the_data_of_a_task_that_is_not_there(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "gone.yaml").write_text(
        f"task: gone\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/gone.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: b\ndoc_to_choice: c\n"
    )
    with pytest.raises(LowRankError, match=r"the data of gone could not be loaded: .*gone\.jsonl"):
        run_tasks(tiny_llama(), tiny_tokenizer, ["gone"], include_path=tmp_path)


def test_tasks_of_the_folder_need_no_index_of_lm_evals_own(
    tiny_llama: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    indexed: list[Path] = []
    yaml_files = TaskIndex._iter_yaml_files

    def listed(root: Path) -> Iterator[Path]:
        indexed.append(root)
        return yaml_files(root)

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(listed))
    run_tasks(tiny_llama(), tiny_tokenizer, ["tiny_cloze"], include_path=task_folder, limit=2)
    assert indexed == [task_folder]


def test_an_unknown_task_gets_a_suggestion(
    tiny_llama: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # lm-eval takes its own tasks from the folder of this file. Theirs take ten seconds to index; this one is empty.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    with pytest.raises(UsageError, match='unknown task "tiny_close"') as caught:
        run_tasks(tiny_llama(), tiny_tokenizer, ["tiny_close"], include_path=task_folder)
    assert caught.value.hint == 'did you mean "tiny_cloze"?'
    with pytest.raises(UsageError, match='unknown task "xyzzy"') as caught:
        run_tasks(tiny_llama(), tiny_tokenizer, ["tiny_cloze", "xyzzy"], include_path=task_folder)
    assert "lm_eval ls tasks" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "no task was named"),
        ({"tasks": ["tiny_cloze"], "include_path": "/no/such/folder"}, "no such folder of tasks: /no/such/folder"),
        ({"tasks": ["tiny_cloze"], "limit": 0}, "at least 1 document, got 0"),
    ],
)
def test_bad_arguments(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_tasks(tiny_llama(), tiny_tokenizer, **arguments)
