"""Tasks for lmms-eval that need no network: the bundled model, asked about held-out digits, and a folder of task files.

`digits` asks for an answer; `digits_choice` has the model weigh every answer of the kind (log-likelihood).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from zipvl_compile.demo.tiny_lvlm import CHECKPOINT, LARGE_CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.canvas import canvas_of
from zipvl_compile.demo.tiny_lvlm.evaluate import questions_for_demo
from zipvl_compile.demo.tiny_lvlm.questions import COUNT_WORDS, DIGIT_WORDS, IMAGE
from zipvl_compile.demo.tiny_lvlm.scenes import COLOUR_NAMES

#: The bundled models were trained on `<bos><image> question` and answer at once. Their folders have no chat template,
#: since nothing but lmms-eval needs one: this one writes just that, for lists of parts and for plain strings.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ ' ' + part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- if not loop.last -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}"""

#: For each kind of question with one word as its answer: all words that answer such a question.
CHOICES = {
    "colour_to_digit": DIGIT_WORDS,
    "position_to_digit": DIGIT_WORDS,
    "digit_to_colour": COLOUR_NAMES,
    "count_all": COUNT_WORDS[1:],
}

UTILS = """\
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    return {"exact_match": float(results[0].split() == doc["answer"].split())}
"""

COMMON = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
"""

GENERATE = """\
task: digits
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 12
process_results: !function utils.process_results
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

CHOOSE = """\
task: digits_choice
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_model(folder: Path, large: bool = False) -> Path:
    """Write a bundled model with a chat template into a folder; return the folder."""
    checkpoint = LARGE_CHECKPOINT if large else CHECKPOINT
    AutoModelForImageTextToText.from_pretrained(checkpoint).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, model: Path, questions: int, choices: int, seed: int = 0) -> Path:
    """Write both tasks, for pictures as a model wants them, into a folder for `--include_path`; return the folder.

    Args:
        folder: is made where it is missing.
        model: a folder with its config.json.
        questions: how many `digits` has.
        choices: how many `digits_choice` has.
        seed: of the questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    canvas = canvas_of(AutoConfig.from_pretrained(model))
    asked = list(questions_for_demo(questions, seed, canvas=canvas))
    chosen = list(questions_for_demo(choices, seed + 1, kinds=CHOICES, canvas=canvas))
    for name, rows, task in (("digits", asked, GENERATE), ("digits_choice", chosen, CHOOSE)):
        data = folder / f"{name}.parquet"
        docs = [_doc(row, CHOICES[row.kind] if task is CHOOSE else ()) for row in rows]
        Dataset.from_list(docs, features=FEATURES).to_parquet(str(data))
        (folder / f"{name}.yaml").write_text(task + COMMON.format(data=data))
    (folder / "utils.py").write_text(UTILS)
    return folder


FEATURES = Features(
    image=Image(), question=Value("string"), answer=Value("string"), kind=Value("string"),
    choices=[Value("string")], gold=Value("int64"),
)  # fmt: skip


def _doc(row: Any, choices: tuple[str, ...]) -> dict[str, Any]:
    gold = choices.index(row.answer) if choices else 0
    question = row.prompt.removeprefix(IMAGE).strip()
    return {"image": row.image, "question": question, "answer": row.answer, "kind": row.kind,
            "choices": list(choices), "gold": gold}  # fmt: skip


def main() -> None:
    """Write a model and its tasks: `python tests/support/lmms_task.py FOLDER [large]`."""
    folder, large = Path(sys.argv[1]).resolve(), "large" in sys.argv[2:]
    model = write_model(folder / "model", large)
    write_tasks(folder / "tasks", model, questions=27 if large else 45, choices=16)


if __name__ == "__main__":
    main()
