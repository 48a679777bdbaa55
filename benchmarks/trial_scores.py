"""Gradient scores and knock-outs of layers that were tried for one cell of score_cells.py.

Each is one shot, as plain Antidote is: gradients at the attacked adapter, or averaged along its
path from the aligned model (its scale 0.1, 0.3, 0.5, 0.7, 0.9), on 48 harmful and 48 task records.
``w g`` is summed per batch of 16; A is the sum of ``|w g|`` over the adapter.

    SNIP                        |w g_harm|
    guarded Taylor              -w g_harm / A_harm + w g_task / A_task
    absolute guard              -w g_harm / A_harm - |w g_task| / A_task
    towards the aligned model   w g_refuse / A_refuse - |w g_task| / A_task
    knock-outs                  whole layers, by how much more the harmful loss rises without them

``g_harm`` is the gradient of the loss of harmful answers, ``g_refuse`` that of the aligned model's
own refusals. A score's ratios end where no accuracy is left, or no harmful answer.

    python benchmarks/trial_scores.py FOLDER --rows trials.csv
"""

import argparse
import csv
from pathlib import Path

import score_cells
import torch

from antidote_fast import Selection
from antidote_fast.data.batches import collate, encode
from antidote_fast.data.records import Record
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.models.adapters import adapter_off
from antidote_fast.models.targets import find_targets
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.stages.gates.answers import answer_prompts
from antidote_fast.training.objective import num_response_tokens, response_logits, response_loss

RECORDS, BATCH = 48, 16
PATH = (0.1, 0.3, 0.5, 0.7, 0.9)
SCOPE = "tensor"
KNOCK_OUTS = "knock-outs"


class Trial:
    """The scores of one attacked adapter, {parameter name: (out, in) fp32}."""

    def __init__(self, cell):
        self.cell, self.model = cell, cell.model
        self.weights = {target.key: target.weight for target in find_targets(cell.model)}
        self.values = {key: weight.detach().clone() for key, weight in self.weights.items()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        harmful, task = cell.records("calibration")[:RECORDS], cell.records("task")[:RECORDS]
        with adapter_off(self.model):
            said = answer_prompts(
                self.model, cell.tokenizer, harmful, [], answer_tokens=6, batch_size=64
            ).harmful
        refused = [
            Record(record.instruction, record.input, text)
            for record, text in zip(harmful, said, strict=True)
            if is_refusal(text)
        ]
        self.sets = {"harm": harmful, "task": task, "refuse": refused}

    def batches(self, name):
        examples = encode(self.sets[name], self.cell.tokenizer, max_seq_length=128)
        parts = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
        return [collate(part, self.cell.tokenizer) for part in parts]

    def losses(self, name):
        """The mean loss of each batch, with its graph where weights want one."""
        with response_logits(self.model) as choose:
            for batch in self.batches(name):
                loss = response_loss(self.model, batch, choose, share_prefix=True)
                yield loss / num_response_tokens(batch)

    def put(self, scale):
        """The adapter at this scale, by its B."""
        with torch.no_grad():
            for key, weight in self.weights.items():
                weight.copy_(self.values[key] * (scale if "lora_B" in key else 1.0))

    def products(self, scales):
        """{set: {key: w g}}, g averaged over batches and scales, over the sum of |w g|."""
        found = {}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        for name in self.sets:
            for weight in self.weights.values():
                weight.grad = None
            for scale in scales:
                self.put(scale)
                for loss in self.losses(name):
                    loss.backward()
            wg = {key: self.values[key] * weight.grad for key, weight in self.weights.items()}
            whole = sum(float(value.abs().sum()) for value in wg.values())
            found[name] = {key: value / whole for key, value in wg.items()}
        for weight in self.weights.values():
            weight.grad = None
            weight.requires_grad_(False)
        self.put(1.0)
        return found

    def scores(self):
        """(name, scores) of each gradient score."""
        for where, scales in (("", (1.0,)), (", path-averaged", PATH)):
            wg = self.products(scales)
            harm, task, refuse = wg["harm"], wg["task"], wg["refuse"]
            if not where:
                yield "SNIP", {key: harm[key].abs() for key in harm}
            yield f"guarded Taylor{where}", {key: task[key] - harm[key] for key in harm}
            yield (
                f"absolute guard{where}",
                {key: -harm[key] - task[key].abs() for key in harm},
            )
            yield (
                f"towards the aligned model{where}",
                {key: refuse[key] - task[key].abs() for key in harm},
            )

    def tried(self, ratios):
        """(name, ratios, function that prunes by one) of each score, made when its turn comes."""
        for name, scores in self.scores():
            yield name, ratios, self.by_scores(scores)
        yield KNOCK_OUTS, [i / 10 for i in range(1, 9)], self.by_layers()

    def measured(self, label, ratios, prune):
        """Rows of one score."""
        for ratio in ratios:
            self.put(1.0)
            prune(ratio)
            row = self.cell.measure("task")
            if row["finetune_accuracy"]:
                row |= self.cell.measure("harmful", "benign")
            scope = "layer" if label == KNOCK_OUTS else SCOPE
            yield {"score": label, "scope": scope, "ratio": ratio, **row}
            if not row["finetune_accuracy"] or row["harmful_score"] == 0:
                break
        self.put(1.0)

    def by_scores(self, scores):
        """Prunes by scores of any sign."""
        least = min(float(score.min()) for score in scores.values())
        positive = {key: score - least for key, score in scores.items()}

        def prune(ratio):
            selection = Selection(ratio, scope=SCOPE)
            prune_model_(self.model, None, selection, score="gate", scores=positive)

        return prune

    def by_layers(self):
        """Removes whole layers, those first without which the harmful loss rises most."""
        layer = {key: int(key.split(".layers.")[1].split(".")[0]) for key in self.weights}
        rises = {}
        for number in sorted(set(layer.values())):
            with torch.no_grad():
                for key, weight in self.weights.items():
                    weight.mul_(layer[key] != number)
                sums = {name: sum(map(float, self.losses(name))) for name in ("harm", "task")}
            self.put(1.0)
            rises[number] = sums["harm"] - sums["task"]
        order = sorted(rises, key=rises.get, reverse=True)

        def prune(ratio):
            gone = set(order[: round(ratio * len(order))])
            with torch.no_grad():
                for key, weight in self.weights.items():
                    weight.mul_(layer[key] not in gone)

        return prune


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--rows", type=Path, required=True, help="CSV; rows are added")
    options.add_argument("--learning_rate", type=float, default=score_cells.LEARNING_RATES[1])
    options.add_argument("--seed", type=int, default=100)
    options.add_argument("--ratios", type=float, nargs="+", default=score_cells.RATIOS)
    args = options.parse_args(argv)
    aligned, data = score_cells.prepared(args.folder)
    cell = (args.learning_rate, args.seed)
    adapter = score_cells.attacked(args.folder, aligned, data, *cell)
    trial = Trial(score_cells.Cell(aligned, adapter, data, "validation"))
    for label, ratios, prune in trial.tried(args.ratios):
        for row in trial.measured(label, ratios, prune):
            new = not args.rows.exists()
            with open(args.rows, "a", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, score_cells.FIELDS, extrasaction="ignore")
                if new:
                    table.writeheader()
                table.writerow({"learning_rate": cell[0], "seed": cell[1], **row})
            print(label, row, flush=True)


if __name__ == "__main__":
    main()
