"""Quantizes a model under any decisions, from one calibration, and measures the file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ptq_onnx.analysis.comparison_results import Closeness
from ptq_onnx.analysis.modules import Module
from ptq_onnx.analysis.results import Error
from ptq_onnx.analysis.segments import Specs
from ptq_onnx.analysis.sensitivity import layerwise_errors
from ptq_onnx.analysis.variants import Images
from ptq_onnx.auto.candidates import WIDTHS, Candidate, find_candidates, with_decisions
from ptq_onnx.auto.closeness import Labels, Recorded
from ptq_onnx.auto.costs import cost_of
from ptq_onnx.auto.search import Option, Stage
from ptq_onnx.auto.trial_runs import TrialRuns
from ptq_onnx.config import stages
from ptq_onnx.config.bits import WIDEST
from ptq_onnx.config.selector import ALL, MoreBits, Selector
from ptq_onnx.evaluation.evaluate import since
from ptq_onnx.evaluation.metrics.metric import Metric
from ptq_onnx.images.source import ImageSource
from ptq_onnx.numerics.spec import Rule
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.half import to_float16
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer


@dataclass(frozen=True)
class Evidence:
    """What decisions are measured on.

    ``reference``: the float file. ``labels_of``: the classes of the images, to be asked for once
    all were read, when their order is known; None without labels. ``held_apart``: calibration did
    not use the images. ``sample``: images of the expectations. ``work``: a folder for files.
    ``metric``: what the drop is of, in place of top-1.
    """

    reference: Path
    images: ImageSource
    labels_of: Callable[[int], Labels] | None
    held_apart: bool
    sample: Images
    work: Path
    metric: Metric | None = None


class Trials:
    """Candidates, what they are expected to gain, and what a set of them really does."""

    def __init__(
        self,
        plan: Plan,
        batches: Iterable[Any],
        evidence: Evidence,
        stage: Stage,
        runs: TrialRuns | None = None,
    ) -> None:
        """``runs``: where the files are run."""
        self._batches, self._evidence, self._stage = batches, evidence, stage
        self.reference = Recorded(
            evidence.reference,
            evidence.images,
            evidence.work,
            labels_of=evidence.labels_of,
            metric=evidence.metric,
            trials=runs,
            threads=plan.config.threads,
            progress=since(stage(stages.RUNNING_FLOAT, len(evidence.images))),
        )
        self._base = make_quantizer(plan)
        statistics = self._base.measure(batches)
        self._specs = self._base.solve(statistics)
        self.plan = replace(plan, statistics=statistics)
        self._cost = cost_of(plan.config)
        self._whole = max(self._cost(plan.model, plan.sites, *self._ends()), 1.0)
        self._known: dict[frozenset[tuple[str, Rule]], tuple[Closeness, float | None]] = {}

    def options(self) -> dict[Option, Candidate]:
        """Every candidate as the search sees it: its cost is its share of the whole model's."""
        candidates = find_candidates(self._base, self._specs)
        noise = self._noise(candidates)
        return {
            Option(c.module, c.kind, noise[c], c.operations / self._whole): c for c in candidates
        }

    def share(self, chosen: Sequence[Candidate]) -> float:
        """What the candidates cost together, in percent of the whole model in float, or in 16
        bits."""
        rules = self._base.rules, self._quantizer(chosen).rules
        return 100 * self._cost(self.plan.model, self.plan.sites, *rules) / self._whole

    def _ends(self) -> tuple[Mapping[str, Rule], Mapping[str, Rule]]:
        """The rules of no decision, and of all: float, or 16 bits for every activation where
        nothing is float, whatever they may have."""
        rules, sites = self._base.rules, self.plan.sites
        if not self.plan.config.runtime.all_codes:
            return rules, {}
        wide = {
            t: r if sites[t].is_parameter else replace(r, bits=WIDEST) for t, r in rules.items()
        }
        return rules, wide

    def measure(self, chosen: Sequence[Candidate]) -> Closeness:
        """The file with those decisions against the float one; the same file once only."""
        return self._measured(chosen)[0]

    def drop_error(self, chosen: Sequence[Candidate]) -> float | None:
        """One standard error of its drop; None without labels."""
        return self._measured(chosen)[1]

    def _measured(self, chosen: Sequence[Candidate]) -> tuple[Closeness, float | None]:
        quantizer = self._quantizer(chosen)
        key = frozenset(quantizer.rules.items())
        if key not in self._known:
            specs = quantizer.calibrate(self._batches)
            lowered = lower(quantizer.model, specs)
            self._known[key] = self._run(
                to_float16(lowered) if self.plan.config.float16 else lowered
            )
        return self._known[key]

    def _quantizer(self, chosen: Sequence[Candidate]) -> SiteQuantizer:
        return make_quantizer(
            replace(self.plan, config=with_decisions(self.plan.config, chosen), progress=None)
        )

    def _run(self, model: ir.Model) -> tuple[Closeness, float | None]:
        """Of a file, as it is deployed: models beyond 2 GB have no other form."""
        with tempfile.TemporaryDirectory(dir=self._evidence.work) as folder:
            path = Path(folder) / "trial.onnx"
            graphs.save(model, path, check=False)
            return self.reference.measure(path)

    def _noise(self, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """Noise to signal at the outputs that each decision is expected to take away: what its
        tensors make when they alone are quantized, less what is left with 8 bits."""
        config = self.plan.config
        module = {c: Module(c.module, "op", c.role, c.block, "all", c.tensors) for c in candidates}
        kinds = {c.kind for c in candidates} & WIDTHS.keys()
        wider = {k: {m for c, m in module.items() if c.kind == k} for k in kinds}
        advance = self._stage(
            stages.EXPECTING, len(set(module.values())) + sum(map(len, wider.values()))
        )

        def errors(modules: Iterable[Module], specs: Specs) -> dict[Module, Error]:
            return layerwise_errors(
                self.plan.model,
                {m: {t: specs[t] for t in m.tensors} for m in modules},
                self._evidence.sample,
                threads=config.threads,
                workers=config.workers,
                progress=advance,
            )

        noise = errors(module.values(), self._specs)
        left: dict[tuple[str, Module], Error] = {}
        for kind, modules in wider.items():
            more = (str(MoreBits(Selector(ALL), WIDTHS[kind])),)
            widest = replace(config, auto=False, max_drop=None, min_sqnr=None, more_bits=more)
            # All at once, so that no trial has to round a weight to 8 bits.
            specs = make_quantizer(replace(self.plan, config=widest, progress=None))
            found = errors(modules, specs.calibrate(self._batches))
            left |= {(kind, module): error for module, error in found.items()}
        return {
            c: noise[m].snr - (left[c.kind, m].snr if c.kind in WIDTHS else 0)
            for c, m in module.items()
        }
