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
from antidote_fast.pruning.report import LayerReport, PruneReport
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
        self._layers = [LayerReport(**layer) for layer in before.get("layers", ())]
        self._skipped = dict(before.get("skipped", {}))
        self._seconds = before.get("seconds", 0.0)
        self._backends = set(before.get("backends", ()))
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
        for key in [key for key in weights if key in routed]:
            if self._goes_by(norms) and not norms.sq_sum[key].any():
                self._skipped[key] = "routed expert that no token reached"
                del weights[key]
        if not weights:
            return
        if norms is not None and set(norms.sq_sum) != set(weights):
            norms = norms.subset(weights)
        kept_by = self._evidence.preserve_norms
        there = {key: tensor.to(self._device) for key, tensor in weights.items()}
        report = prune_state_(
            there,
            dataclasses.replace(
                self._evidence,
                norms=norms,
                preserve_norms=None if kept_by is None else kept_by.subset(weights),
                base_weights=None if self._aligned is None else self._aligned.read(weights),
            ),
            self._selection,
            cut=cut,
            **self._config.prune_options,
        )
        for key, tensor in weights.items():
            if there[key] is not tensor:
                tensor.copy_(there[key])
        self._layers += report.layers
        self._backends.add(report.backend)
        self._seconds += report.seconds
        for key, mask in (report.masks or {}).items():
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
        layers = [dataclasses.asdict(x) for x in list(self._layers) if x.key in written]
        return {
            "writer": {
                "layers": layers,
                "skipped": self._skipped,
                "seconds": self._seconds,
                "backends": sorted(self._backends),
                "written": list(self._written),
                "digests": self._sink.digests,
            }
        }

    def rewrite(self, norms, request, background, progress):
        """Read, prune and write block after block, with norms that are there or a score without."""
        cut = self._cut(norms, request, progress) if self._selection.scope == "global" else None
        groups = {}
        for name in self._base.tensors:
            match = _BLOCK.match(name)
            groups.setdefault(match[1] if match else "", []).append(name)
        done = set(self._written)
        background.submit(
            self.copy_others, {n for group, ns in groups.items() if group for n in ns}
        )
        background.wait()
        left = [
            names
            for group, names in sorted(groups.items(), key=lambda item: natural_key(item[0]))
            if group and not done.issuperset(names)
        ]
        for number, names in enumerate(track(left, "prune", progress), 1):
            pruned = [name for name in names if name in self._saved]
            tensors = {name: read_tensor(self._base.tensors[name]) for name in pruned}
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
        if not self._layers:
            raise NothingPruned(
                f"nothing to prune: {len(self._skipped)} weights, all of routed experts that no "
                "token reached"
            )
        self._sink.finish()
        return self._sink.digests

    def report(self) -> PruneReport:
        """As :func:`antidote_fast.pruning.prune.prune_state_` gives it; the masks are in their
        file."""
        return PruneReport(
            score=self._config.score,
            scope=self._selection.scope,
            ratio=self._selection.ratio,
            largest=self._selection.largest,
            n_m=None,
            seed=self._config.seed,
            backend="+".join(sorted(self._backends)),
            layers=sorted(self._layers, key=lambda layer: natural_key(layer.key)),
            skipped=self._skipped,
            seconds=self._seconds,
            preserve_ratio=self._selection.preserve.ratio if self._config.preserves else None,
            score_delta=self._selection.score_delta,
            reverted=self._aligned is not None,
        )

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
