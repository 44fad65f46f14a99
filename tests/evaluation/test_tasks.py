"""The task files in evals/tasks, on made-up files in the forms of the benchmark files."""

from __future__ import annotations

import bz2
import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.errors import LowRankError
from lowrank_kit.evaluation.harness import run_tasks

FOLDER = Path(__file__).parents[2] / "evals" / "tasks"
LM_EVAL = Path(lm_eval.tasks.__file__).parent
Row = dict[str, Any]


def json_lines(*rows: Row) -> str:
    # As they are: U+2028 inside a string is no end of a line.
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


PAIRS = [
    {"sentence_good": f"A dog {number} barks.", "sentence_bad": f"A dog {number} bark.", "UID": "x"}
    for number in range(3)
]
PASSAGES = ['"Where is it?"\n\nShe asked\u2028 for the map', "We saw it\n\nthere"]
GOALS = [{"goal": "dry a cup ", "sol1": "a towel ", "sol2": "a  brick"}, {"goal": "dust", "sol1": "it", "sol2": "no"}]
QUESTIONS = [
    ("Which is  wet?", ["water", "sand", "air"], 0),
    ("How many?\nCount.", ["one", "two", "three", "four", "five"], 4),
]
READINGS = [
    {"context_options": ["Ann met Bo as Ann", "Ann met Bo as Bo"], "continuation": "had time.", "gold": 1},
    {"context_options": ["It fell. The cup", "It fell. The table"], "continuation": ".", "gold": 0},
]
HEADING = " \n = Ants = \n \n Ants are small , they say . \n \n = = Life = = \n \n Short @-@ lived . \n"
SECOND_PAGE = " \n = Bees = \n \n They fly , 's \n"

# What a task's file holds.
FILES: dict[str, str | bytes] = {
    "lambada/lambada_test.jsonl": json_lines(*({"text": text} for text in PASSAGES)),
    "lambada/lambada_test_plain_text.txt": "she asked for\u2028 the map\nwe saw it there\n",
    "hellaswag/hellaswag_val_full.txt.bz2": bz2.compress(
        b"Rowing: A man sits. the man in a boat\n3\nrows.\nsinks.\nflies [x] off.\nsings.\n"
        b"Home: How to dry a cup. Use a towel.\n0\nA dry one. Rub it.\nA wet one.\nNone.\nA brick.\n"
    ),
    "piqa/valid.jsonl": json_lines(*GOALS),
    "piqa/valid-labels.lst": "0\n1\n",
    "arc_llmadapters/ARC-Easy.test.json": json.dumps(
        [
            {
                "instruction": f"Please choose the correct answer to the question: {question}\n\n"
                + " ".join(f"Answer{number}: {answer}" for number, answer in enumerate(answers, 1))
                + "\n\nAnswer format: "
                + "/".join(f"answer{number + 1}" for number in range(len(answers))),
                "answer": f"answer{right + 1}",
            }
            for question, answers, right in QUESTIONS
        ]
    ),
    "mcq_llmfoundry/openbook_qa.jsonl": json_lines(
        *({"query": question, "choices": answers, "gold": right} for question, answers, right in QUESTIONS)
    ),
    "mcq_llmfoundry/copa.jsonl": json_lines(
        {"query": "The cup, a tall one, fell, because", "choices": ["i hit it.", "the sun set."], "gold": 0},
        {"query": "It rained, therefore", "choices": ["dust rose.", "we left."], "gold": 1},
    ),
    "mcq_llmfoundry/boolq.jsonl": json_lines(
        {"query": "Passage: Ants\nare small.\nQuestion: are ants small?", "choices": ["no", "yes"], "gold": 1}
    ),
    "mcq_llmfoundry/winogrande.jsonl": json_lines(READINGS[0]),
    "mcq_llmfoundry/winograd_wsc.jsonl": json_lines(*READINGS),
    "wikitext-2/wiki.test.raw": HEADING + SECOND_PAGE,
}
FILES["arc_llmadapters/ARC-Challenge.test.json"] = FILES["arc_llmadapters/ARC-Easy.test.json"]
MMLU = 'question,choice0,choice1,choice2,choice3,answer\n" What, is\nit?",a,b,c,d,2\n'


def original_questions(stem: str) -> list[Row]:
    return [
        {
            stem: question,
            "choices": {"text": answers, "label": list("ABCDE")[: len(answers)]},
            "answerKey": "ABCDE"[right],
        }
        for question, answers, right in QUESTIONS
    ]


# The same rows as lm-eval's own task reads them, from the hub.
ORIGINALS: dict[str, tuple[str, list[Row]]] = {
    "blimp_passive_1": ("blimp/passive_1.yaml", PAIRS),
    "lambada_openai": ("lambada/lambada_openai.yaml", [{"text": text} for text in PASSAGES]),
    "lambada_standard": (
        "lambada/lambada_standard.yaml",
        [{"text": "she asked for\u2028 the map"}, {"text": "we saw it there"}],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        [
            {
                "activity_label": "Rowing",
                "ctx_a": "A man sits.",
                "ctx_b": "the man in a boat",
                "endings": ["rows.", "sinks.", "flies [x] off.", "sings."],
                "label": "3",
            },
            {
                "activity_label": "Home",
                "ctx_a": "[header] How to dry a cup [title] Use a towel.",
                "ctx_b": "",
                "endings": ["A dry one [title] Rub [step] it.", "A wet one.", "None.", "A brick."],
                "label": "0",
            },
        ],
    ),
    "piqa": ("piqa/piqa.yaml", [{**GOALS[0], "label": 0}, {**GOALS[1], "label": 1}]),
    "arc_easy": ("arc/arc_easy.yaml", original_questions("question")),
    "arc_challenge": ("arc/arc_challenge.yaml", original_questions("question")),
    "openbookqa": ("openbookqa/openbookqa.yaml", original_questions("question_stem")),
    "copa": (
        "super_glue/copa/default.yaml",
        [
            {
                "premise": "The cup, a tall one, fell.",
                "question": "cause",
                "choice1": "I hit it.",
                "choice2": "The sun set.",
                "label": 0,
            },
            {"premise": "It rained.", "question": "effect", "choice1": "Dust rose.", "choice2": "We left.", "label": 1},
        ],
    ),
    "boolq_no_title": (
        "super_glue/boolq/default.yaml",
        [{"passage": "Ants\nare small.", "question": "are ants small", "label": 1}],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        [{"sentence": "Ann met Bo as _ had time.", "option1": "Ann", "option2": "Bo", "answer": "2"}],
    ),
    "wsc273": (
        "wsc273/default.yaml",
        [
            {
                "text": "Ann met Bo as she had time.",
                "pronoun": "she",
                "pronoun_loc": 14,
                "options": ["Ann", "Bo"],
                "label": 1,
            },
            {
                "text": "It fell. It.",
                "pronoun": "It",
                "pronoun_loc": 9,
                "options": ["The cup", "The table"],
                "label": 0,
            },
        ],
    ),
    "mmlu_world_religions": (
        "mmlu/default/mmlu_world_religions.yaml",
        [{"question": " What, is\nit?", "choices": ["a", "b", "c", "d"], "answer": 2}],
    ),
    "wikitext": ("wikitext/wikitext.yaml", [{"page": HEADING.removeprefix(" \n") + " "}, {"page": SECOND_PAGE[2:]}]),
}
# What says where rows come from and what other rows there are; no prompt and no metric.
ELSEWHERE = {
    "dataset_path",
    "dataset_name",
    "custom_dataset",
    "dataset_kwargs",
    "training_split",
    "tag",
    "process_docs",
}
ELSEWHERE |= {
    "validation_split",
    "test_split",
    "fewshot_split",
    "fewshot_config",
    "num_fewshot",
    "should_decontaminate",
    "doc_to_decontamination_query",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as $LOWRANK_EVAL_DATA names it, with two or three rows in every file."""
    folder = tmp_path_factory.mktemp("eval")
    named = {load_yaml(path, resolve_func=False).get("dataset_kwargs", {}).get("file") for path in task_files()}
    files = dict(FILES)
    files |= {file: json_lines(*PAIRS) for file in named if file and file.startswith("blimp/")}
    files |= {file: MMLU for file in named if file and file.startswith("mmlu_subset/")}
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def here(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_EVAL_DATA", str(data))
    return data


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=FOLDER, include_defaults=False)


def task_files() -> list[Path]:
    return sorted(FOLDER.rglob("*.yaml"))


def requests(task: ConfigurableTask) -> list[tuple[Any, ...]]:
    """What the model is asked, and what each document holds as its answer."""
    task.set_config(key="num_fewshot", value=0)
    task.set_config(key="repeats", value=1)
    task.build_all_requests(rank=0, world_size=1)
    asked = [request.args for request in task.instances]
    return [*asked, *(task.doc_to_target(doc) for doc in task.eval_docs)]


def stock(file: str, rows: list[Row]) -> ConfigurableTask:
    """lm-eval's own task of that file, on rows given here instead of the hub's."""
    config = load_yaml(LM_EVAL / file)
    dataset = Dataset.from_list(rows)
    splits = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    for key in ("training_split", "fewshot_split", "fewshot_config"):
        config.pop(key, None)
    config["custom_dataset"] = lambda **_: dict.fromkeys(splits, dataset)
    return ConfigurableTask(config=config)


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_model_is_asked_what_lm_evals_own_task_asks(manager: TaskManager, here: Path, name: str) -> None:
    ours = manager.load([name])["tasks"][name]
    assert requests(ours) == requests(stock(*ORIGINALS[name]))


def stock_file(name: str) -> str:
    if name in ORIGINALS:
        return ORIGINALS[name][0]
    return f"mmlu/default/{name}.yaml" if name.startswith("mmlu_") else f"blimp/{name.removeprefix('blimp_')}.yaml"


def config_of(path: Path) -> Row:
    """Prompts, metrics and the split that is scored; a function by its name."""
    config = load_yaml(path)
    config["scored"] = config.get("test_split") or config["validation_split"]
    named = {key: f"{value.__module__}.{value.__name__}" for key, value in config.items() if callable(value)}
    return {key: value for key, value in {**config, **named}.items() if key not in ELSEWHERE}


def test_every_file_has_the_prompts_and_metrics_of_lm_evals_file_of_that_name(manager: TaskManager) -> None:
    for name in manager.all_subtasks:
        theirs = config_of(LM_EVAL / stock_file(name)) | {"task": name}
        assert config_of(Path(str(manager.task_index[name].yaml_path))) == theirs, name


def test_every_file_loads_and_renders(manager: TaskManager, here: Path) -> None:
    names = [name for name in manager.all_tasks if name not in manager.all_tags + manager.all_groups]
    assert len(names) == len([path for path in task_files() if path.name != "_group.yaml"])
    for name, task in manager.load(names)["tasks"].items():
        assert requests(task), name
        assert task.get_config("num_fewshot") == 0
    in_groups = manager.load(list(manager.all_groups))["tasks"]
    assert set(in_groups) == {name for name in names if name.startswith(("blimp_", "mmlu_"))}


def test_scores_are_the_same_to_the_digit_when_repeated(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, here: Path
) -> None:
    names = ["blimp", "mmlu_subset", *(name for name in ORIGINALS if not name.startswith(("blimp", "mmlu")))]
    once, again = (run_tasks(tiny_llama(), tiny_tokenizer, names, include_path=FOLDER) for _ in range(2))
    assert once == again
    by_task = {score.task: score for score in once}
    assert set(names) <= set(by_task)
    assert by_task["blimp"].num_docs == 3 * 57
    assert {"word_perplexity", "byte_perplexity", "bits_per_byte"} == {s.metric for s in once if s.task == "wikitext"}


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (None, "the environment variable LOWRANK_EVAL_DATA is not set"),
        ("absent", "there is no folder .*absent, which LOWRANK_EVAL_DATA names"),
        ("", r"there is no file .*piqa.valid\.jsonl"),
        ("damaged", r"damaged.piqa.valid\.jsonl is not as expected after 1 rows: KeyError\('goal'\)"),
    ],
)
def test_data_that_is_not_there(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str | None,
    message: str,
) -> None:
    damaged = tmp_path / "damaged" / "piqa"
    damaged.mkdir(parents=True)
    (damaged / "valid.jsonl").write_text(json_lines(GOALS[0], {"question": "?"}))
    (damaged / "valid-labels.lst").write_text("0\n1\n")
    if folder is None:
        monkeypatch.delenv("LOWRANK_EVAL_DATA", raising=False)
    else:
        monkeypatch.setenv("LOWRANK_EVAL_DATA", str(tmp_path / folder))
    with pytest.raises(LowRankError, match=f"the data of piqa could not be loaded: .*{message}") as caught:
        run_tasks(tiny_llama(), tiny_tokenizer, ["piqa"], include_path=FOLDER)
    if folder != "damaged":
        assert "set LOWRANK_EVAL_DATA to the folder" in str(caught.value.hint)
        assert "README.md" in str(caught.value.hint)


def test_the_files_of_blimp_and_mmlu_are_what_the_script_writes(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "make_yaml.py"), "-o", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "LOWRANK_EVAL_DATA": str(data)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for folder in ("blimp", "mmlu"):
        names = [path.name for path in (FOLDER / folder).glob("*.yaml")]
        assert sorted(names) == sorted(path.name for path in (tmp_path / folder).iterdir())
        assert filecmp.cmpfiles(FOLDER / folder, tmp_path / folder, names, shallow=False)[0] == names
