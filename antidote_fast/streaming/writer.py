"""The block that is next is read, the one before it pruned and written, both beside the forward."""

import dataclasses
import re

from antidote_fast.config.scores import SCORES
from antidote_fast.errors import Interrupted, NothingPruned
from antidote_fast.files.tensor_file import read_tensor
from antidote_fast.masks import mask_key, masks_file
from antidote_fast.models.loading import pick_device
from antidote_fast.models.targets import natural_key
from antidote_fast.pruning.global_cut import GlobalCut, find_cut
from antidote_fast.pruning.prune import prune_state_
from antidote_fast.pruning.report import PruneReport
from antidote_fast.streaming.sink import ModelSink
from antidote_fast.system.progress import track

_BLOCK = re.compile(r"(.*?\.\d+)\.")


class Writer:
    """A pruned model on its way to ``run.output``, and the report of it.

    Args:
        config: a :class:`PruneConfig`.
        base: the model's checkpoint.
        run: :class:`antidote_fast.files.resume.Run`, whose state it goes on from.
        keys: names of the weights to prune.
        evidence: what they are pruned by, but for ``norms`` and ``base_weights``, which come block
            by block.
        aligned: checkpoint of the model whose values removed weights take, or None.
    """

    def __init__(self, config, base, run, keys, evidence, aligned):
        self._config, self._base, self._run = config, base, run
        self._selection = config.selection
        self._evidence, self._aligned = evidence, aligned
        self._device = pick_device(config.device)
        self._saved = {base.find(key): key for key in keys}
        before = run.state.get("writer", {})
        about = {
            "score": config.score,
            "scope": self._selection.scope,
            "ratio": self._selection.ratio,
            "largest": self._selection.largest,
            "n_m": None,
            "seed": config.seed,
            "backend": "",
            "layers": [],
            "skipped": {},
            "seconds": 0.0,
            "preserve_ratio": self._selection.preserve.ratio if config.preserves else None,
            "score_delta": self._selection.score_delta,
            "reverted": aligned is not None,
        }
        self._report = PruneReport.from_dict(before.get("report", about))
        self._written = list(before.get("written", ()))
        self._sink = ModelSink(base, run.output, self._written, before.get("digests"))
        self._masks = None
        if config.save_masks:
            shapes = {key: self._shape(key) for key in sorted(keys, key=natural_key)}
            about = {"score": config.score, "scope": config.scope, "ratio": str(config.ratio)}
            path = run.output / "masks.safetensors"
            self._masks = masks_file(path, shapes, about, keep=bool(self._written))

    def copy_others(self, names):
        """Copy what is in no block as it is, unless an interrupted run has."""
        others = [x for x in self._base.tensors if x not in names and x not in set(self._written)]
        self._sink.copy(others)
        self._written += others

    def prune(self, tensors, norms, cut=None):
        """Prune the targets among a block's tensors, {name as saved: tensor}, in place."""
        weights = {
            self._saved[name]: tensor for name, tensor in tensors.items() if name in self._saved
        }
        routed = {*self._evidence.routed, *(norms.routed if norms else ())}
        if self._goes_by(norms):
            for key in [k for k in weights if k in routed and not norms.sq_sum[k].any()]:
                self._report.skipped[key] = "routed expert that no token reached"
                del weights[key]
        if not weights:
            return
        base_weights = None if self._aligned is None else self._aligned.read(weights)
        evidence = dataclasses.replace(self._evidence, norms=norms, base_weights=base_weights)
        there = {key: tensor.to(self._device) for key, tensor in weights.items()}
        options = self._config.prune_options
        part = prune_state_(there, evidence.narrowed(weights), self._selection, cut=cut, **options)
        for key, tensor in weights.items():
            if there[key] is not tensor:
                tensor.copy_(there[key])
        report = self._report
        report.layers += part.layers
        report.backend = "+".join(sorted({*report.backend.split("+"), part.backend} - {""}))
        report.seconds += part.seconds
        for key, mask in (part.masks or {}).items():
            self._masks.write(mask_key(key), mask.bits)

    def write(self, tensors):
        """Write a block's tensors, pruned or not."""
        self._sink.write(tensors)
        self._written += tensors

    def state(self):
        """What :meth:`__init__` takes up again; what it tells of is on the disk."""
        self._sink.sync()
        if self._masks is not None:
            self._masks.sync()
        # The next block may be pruned already, and is not yet written.
        written = {self._saved.get(name) for name in self._written}
        layers = [layer for layer in list(self._report.layers) if layer.key in written]
        skipped = dict(self._report.skipped)
        report = dataclasses.replace(self._report, layers=layers, skipped=skipped)
        return {
            "writer": {
                "report": dataclasses.asdict(report),
                "written": list(self._written),
                "digests": self._sink.digests,
            }
        }

    def rewrite(self, norms, request, background, progress):
        """Read, prune and write block after block, with norms that are there or a score without."""
        cut = self._cut(norms, request, progress) if self._selection.scope == "global" else None
        groups = {}
        for name in filter(_BLOCK.match, self._base.tensors):
            groups.setdefault(_BLOCK.match(name)[1], []).append(name)
        done, in_blocks = set(self._written), {name for names in groups.values() for name in names}
        background.submit(self.copy_others, in_blocks)
        background.wait()
        blocks = (groups[block] for block in sorted(groups, key=natural_key))
        left = [names for names in blocks if not done.issuperset(names)]
        for number, names in enumerate(track(left, "prune", progress), 1):
            entries = {name: self._base.tensors[name] for name in names if name in self._saved}
            tensors = {name: read_tensor(entry) for name, entry in entries.items()}
            self.prune(tensors, norms, cut)
            others = [name for name in names if name not in tensors]
            background.submit(self._finish, tensors, others)
            tensors = None
            if request.made:
                background.wait()
                raise Interrupted(
                    f"interrupted after block {number} of {len(left)} that were left; the same "
                    "command with --resume goes on"
                )

    def finish(self):
        """Name the files; returns their digests."""
        if not self._report.layers:
            raise NothingPruned(
                f"nothing to prune: {len(self._report.skipped)} weights, all of routed experts "
                "that no token reached"
            )
        self._sink.finish()
        return self._sink.digests

    def report(self) -> PruneReport:
        """As :func:`antidote_fast.pruning.prune.prune_state_` gives it; the masks are in their
        file."""
        layers = sorted(self._report.layers, key=lambda layer: natural_key(layer.key))
        return dataclasses.replace(self._report, layers=layers)

    def _finish(self, tensors, others):
        self._sink.copy(others)
        self._written += others
        self.write(tensors)
        self._run.save({**self._run.state, **self.state()})

    def _cut(self, norms, request, progress):
        evidence = dataclasses.replace(self._evidence, norms=norms)
        if "cut" in self._run.state:
            return GlobalCut.from_dict(self._run.state["cut"], evidence)
        transposed = {*evidence.transposed, *(norms.transposed if norms else ())}
        names = {key: name for name, key in self._saved.items()}

        def read(key):
            if request.made:
                raise Interrupted("interrupted; the same command with --resume goes on")
            return upright(key, read_tensor(self._base.tensors[names[key]]))

        def read_base(key):
            return upright(key, self._aligned.read([key])[key])

        def upright(key, tensor):
            return tensor.t().contiguous() if key in transposed else tensor

        keys = list(names)
        if self._goes_by(norms):
            keys = [k for k in keys if k not in norms.routed or norms.sq_sum[k].any()]
        cut = find_cut(
            keys,
            read,
            evidence,
            self._selection,
            seed=self._config.seed,
            read_base=None if self._aligned is None else read_base,
            progress=progress,
        )
        self._run.save({**self._run.state, "cut": cut.to_dict()})
        return cut

    def _goes_by(self, norms):
        """Whether these norms, which may be None, decide which weights are removed."""
        return norms is not None and SCORES[self._config.score].needs_norms

    def _shape(self, key):
        rows, columns = self._base.tensors[self._base.find(key)].shape
        return (columns, rows) if key in self._evidence.transposed else (rows, columns)
