"""`load` and `Model`: the one object that users hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import loading
from .batches import BATCH
from .checks.selfcheck import Check, check_atlas
from .errors import PlanError, SiteError, wrong
from .files import without_folder
from .foreign import MODEL, Abroad, Answering
from .placement import Placement
from .positions import PositionLike
from .run import CompiledPlan, Each, Run, in_step
from .session import Input, Session, is_remote
from .sites import SITES, Edit, Site
from .vision.places import VisualToken, visual_grid

if TYPE_CHECKING:
    from .activations import Activations
    from .engines.replace import Rule
    from .generation import Generation
    from .runs import RunFolder
    from .score import Score
    from .sweep import Sweep

Variants = Iterable[Edit | Sequence[Edit]] | Mapping[Any, Edit | Sequence[Edit]]
"""What `Model.sweep` takes."""


def load(
    source: str | nn.Module,
    *,
    engine: str = "torch",
    engine_options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    offload_folder: str | Path | None = None,
    tp_plan: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    check: bool = True,
) -> Model:
    """A model, ready for runs.

    Args:
        source: a hub id, a local folder, a `.gguf` file of llama.cpp (dequantised), `"toy:text"`, `"smollm2"` (the real
            model of docs/real_model.md), or a Hugging Face model in memory (with its `tokenizer`).
        engine: which engine carries out plans: `"torch"`, `"nnsight"`, `"transformer_lens"`, or a plugin's.
        engine_options: settings of that engine, such as `{"fold": True}` for `transformer_lens`.
        dtype: of the weights (default: as stored; float32 for quantised GGUF files and `"smollm2"`).
        device: default CUDA if there is one, else CPU. Or a `device_map` for accelerate, or a `tp_plan`. `"meta"` reads
            no weights, for plans that run elsewhere (`engine_options={"remote": True}`); nothing is verified then.
        offload_folder: where weights go that a `device_map` sends to disk and that cannot be read from the model's own
            files; default a temporary folder, which goes with the model.
        tp_plan: `"auto"`, a style per module, or a `DistributedConfig` of transformers: tensor and expert parallelism
            between the processes of `torchrun`, which all run the same program. See docs/cluster.md.
        attn_implementation: as in transformers; attention sites need `"sdpa"` or `"eager"`.
        revision: of a hub repository.
        trust_remote_code: run code that comes with the model.
        check: verify the atlas on the model itself (four short forward passes).

    Raises:
        LoadError: nothing usable there; the message says what to do.
        CapabilityError: no such engine, or it cannot run this model.
    """
    opened = loading.open_model(
        source,
        Placement(device, device_map, offload_folder, tp_plan, is_remote(engine_options)),
        tokenizer=tokenizer,
        processor=processor,
        dtype=dtype,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return Model(opened, engine=engine, engine_options=engine_options, check=check)


class Model(Answering, Session):
    """A language model whose inside can be named, read and changed.

    Attributes:
        hf: the Hugging Face model, unchanged between runs.
        tokenizer: its tokenizer, or None.
        processor: what makes pixels of images, or None; `no_processor` says why.
        atlas: which sites it has.
        check: what the self-check at load found (None without check).
    """

    _abroad = Abroad("a Model", MODEL, "model.run(text, read={})", SITES)
    _inner = frozenset(
        ("atlas", "engine", "first_position", "fit", "fresh", "input", "keeps_logits", "program", "renew", "reopen",
         "sample", "snapshot", "steps_wrong", "strategy_checks", "takes", "told_positions", "turn", "without_cache")
    )  # fmt: skip

    def __init__(
        self,
        opened: loading.Opened,
        *,
        engine: str = "torch",
        engine_options: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> None:
        # Before `Session` opens the model, which calls `reopen`.
        self._checks = check
        super().__init__(opened, engine, {} if engine_options is None else engine_options)

    def reopen(self) -> None:
        """See `Session.reopen`; the atlas is checked again too."""
        super().reopen()
        try:
            self.check: Check | None = check_atlas(self) if self._checks and not self.weightless else None
        except BaseException:  # an interrupt too: the next run must not take what nobody has checked for checked
            self.snapshot.forget()
            raise

    def __repr__(self) -> str:
        return f"Model({without_folder(self.source)!r}, {self._sized()})"

    def _repr_html_(self) -> str:
        view = self.sites._view()
        return view._replace(title=f"Model {without_folder(self.source)}: {self._sized()}").html()

    def _sized(self) -> str:
        shape, dtype = self.atlas.shape, str(self.dtype).removeprefix("torch.")
        sizes = f"{self.atlas.family.name}, {shape.n_layers} layers, d_model {shape.d_model}"
        return f"{sizes}, {dtype} on {self.device}, engine {self.engine.name}"

    def on(self, engine: str, **options: Any) -> Model:
        """The same model on another engine, weights shared.

        Raises:
            CapabilityError: as `load`.
        """
        opened = loading.Opened(self.hf, self.tokenizer, self.processor, self.source, self.no_processor)
        return Model(opened, engine=engine, engine_options=options)

    def visual_grid(self, x: Input) -> list[list[VisualToken]]:
        """Per row, which image, grid cell and pixels each visual token stands for.

        Args:
            x: what a processor returned (or `Tokens` of it).

        Raises:
            CapabilityError: a family whose grids are not known, or videos.
            TextError: no images, or placeholders that do not fit them.
        """
        return visual_grid(self.input(x), self.hf.config, self.atlas.family)

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """A model is not called: `run` gives more than logits.

        Raises:
            PlanError: saying so.
        """
        raise PlanError("a model is not called: write model.run(text).logits")

    # Running

    def run(
        self,
        x: Input,
        read: Iterable[Site | str] | Site | str = (),
        edits: Iterable[Edit] | Edit = (),
        *,
        grad: Score | Callable[[Tensor], Tensor] | bool = False,
        logits: bool | PositionLike = True,
        each: Each | None = None,
        attention: bool = False,
        allow_noop: bool = False,
    ) -> Run:
        """One forward pass with reads and edits.

        Args:
            x: text, texts, `Tokens`, a tokenizer's output or ids.
            read: sites to keep; `run[site]` gives their values.
            edits: changes, in order.
            grad: a score, or a function of the logits `[batch pos d_vocab]` that returns one number: `run.grad[site]`
                is then its gradient (of a score, each row's own) with respect to every site read. True keeps the graph
                for your own `backward`. Where an edit's value requires grad, the graph is kept anyway. Weights get no
                gradient.
            logits: False ends the pass after the last site read; a position computes only these logits.
            each: called as `each(layer, values)` when all that is read of a layer has passed, which is then let go.
            attention: hand `each` the layer's attention too: `values.attention` gives rows of its pattern, also after
                the run (`AttentionRows`), where `can("pattern", "rows")` has nothing against it.
            allow_noop: let edits pass that changed nothing.

        Raises:
            SiteError, PositionError, PlanError, CapabilityError, TextError: before the forward pass.
            EffectError: an edit did nothing.
        """
        plan = CompiledPlan(self, *self.program(read, edits))
        return plan.run(x, grad=grad, logits=logits, each=each, attention=attention, allow_noop=allow_noop)

    def replacing(
        self,
        modules: Mapping[nn.Module | type[nn.Module] | str, Rule] = MappingProxyType({}),
        *,
        attention: Rule | None = None,
        operations: Mapping[str, Rule] = MappingProxyType({}),
    ) -> AbstractContextManager[None]:
        """For the runs of a `with` block, functions in the place of modules' forwards, of attention and of operations.

        Args:
            modules: per module of the model, class of modules, or component (`"ln1"`: of every layer that has it),
                `rule(module, forward, *args, **kwargs)`.
            attention: `rule(module, kernel, query, key, value, attention_mask, **kwargs)`, for every layer.
            operations: per operation (`"mul"` and `"matmul"` of two differentiable tensors, `"rsqrt"`, `"softmax"`,
                `"activation"`, `"layer_norm"`, `"rms_norm"`, `"sdpa"`) `rule(operation, *args, **kwargs)`.

        Raises:
            PlanError, CapabilityError: what is not there, or cannot be replaced, before the block begins.
        """
        from .replacing import replacing

        return replacing(self, modules, attention, operations)

    @overload
    def sweep(
        self, x: Input, variants: Variants, score: Score, *, strategy: str = "auto",
        memory_budget: int | None = None, out: str | Path | RunFolder | None = None, progress: bool = False,
    ) -> Sweep: ...  # fmt: skip

    @overload
    def sweep(
        self, x: Input, variants: Variants, score: Sequence[Score], *, strategy: str = "auto",
        memory_budget: int | None = None, out: str | Path | RunFolder | None = None, progress: bool = False,
    ) -> tuple[Sweep, ...]: ...  # fmt: skip

    def sweep(
        self,
        x: Input,
        variants: Variants,
        score: Score | Sequence[Score],
        *,
        strategy: str = "auto",
        memory_budget: int | None = None,
        out: str | Path | RunFolder | None = None,
        progress: bool = False,
    ) -> Sweep | tuple[Sweep, ...]:
        """Run many variants of a text, each with its own edits, and score them: exactly what one run per variant gives,
        for the price of what each changes; see `sweep` for how.

        Args:
            x: as in `run`; each row of a batch is swept.
            variants: what to change, an edit or several per variant; by keys of your own, if you like: a mapping from
                strings, numbers or tuples of these, such as `{(layer, head): edit, …}`.
            score: `ic.score.logprob(target)` and so on; of several that read the same place, each gets its own `Sweep`
                of the same passes.
            strategy: "auto" takes the cheapest that is exact here. "full" is one forward pass per variant, "batched"
                many variants per pass, "restart" leaves out layers below the first edited one, "prefix" positions
                before it, "staircase" both.
            memory_budget: bytes that one pass may take (default: half of what is free).
            out: a folder for the scores as they come, where a sweep that was stopped goes on; or an open run of
                `ic.runs`, whose processes share the variants.
            progress: show from the beginning how much is done, on standard error; else from three seconds on.

        Raises:
            SiteError, PositionError, PlanError, CapabilityError: before anything runs.
            LoadError: the folder holds something else.
        """
        from .score import Score
        from .sweep import checked, sweep
        from .sweep.keys import by_key

        keys, changes = by_key(variants)
        listed, scores = checked(changes, score, memory_budget, out)
        with torch.inference_mode(False):  # what is kept for later runs serves those with gradients too
            with self.turn:
                self.renew()
            with in_step(self, "sweep", x, listed):
                sweeps = sweep(self, x, listed, scores, strategy, memory_budget, out, progress, keys)
        return sweeps[0] if isinstance(score, Score) else sweeps

    def collect(
        self,
        texts: Iterable[Input],
        read: Iterable[Site | str] | Site | str,
        *,
        out: str | Path,
        batch_size: int = BATCH,
        progress: bool = False,
    ) -> Activations:
        """Read sites of many texts into a folder, a batch in memory at a time; what was stopped goes on there.

        Args:
            texts: texts, `Tokens` or inputs, one by one; a generator is drawn from as it goes.
            read: sites, at positions that mean the same in every text: numbers, slices, names.
            out: a run folder; texts that follow those that are there are added.
            batch_size: texts that run together, sorted by length.
            progress: show from the beginning how much is done, on standard error; else from three seconds on.

        Raises:
            SiteError, PlanError, CapabilityError: before anything runs.
            PlanError: the folder is of another model, of other sites or of other texts, naming what differs.
            PositionError, TextError: a text that does not fit, by its number, before those around it run.
        """
        from .collect import collect

        return collect(self, texts, read, out, batch_size, progress)

    def compile(self, read: Iterable[Site | str] | Site | str = (), edits: Iterable[Edit] | Edit = ()) -> CompiledPlan:
        """A plan checked against this model, for use in loops. What was compiled last is kept, so that `run` finds it,
        also for edits with other values."""
        return CompiledPlan(self, *self.program(read, edits))

    def generate(self, x: Input, edits: Iterable[Edit] | Edit = (), read: Any = (), **options: Any) -> Generation:
        """Generate text with edits and reads at every step; see `generation.generate`."""
        from .generation import generate

        with torch.inference_mode(False):
            with self.turn:
                self.renew()
            return generate(self, x, edits, read, **options)

    def project(
        self, z: Float[Tensor, "... head d_head"], layer: int, *, added: bool = False
    ) -> Float[Tensor, "... d_model"]:
        """What a layer's attention gives for these heads: its own output projection, bias included.

        Args:
            added: as the block adds it to the stream: through a post-norm and multiplier where the family has them.

        Raises:
            PlanError: not `[… head d_head]`.
            SiteError, CapabilityError: no such layer, or one whose heads are not known.
        """
        from .readout import demand_width, project

        if isinstance(layer, bool) or not isinstance(layer, int):
            raise SiteError(wrong("project", "the number of a layer", layer))
        with self.turn:
            self.renew()
            sizes = self.atlas.select(Site("z", layer))[0].sizes
            demand_width("project", z, sizes["head"], sizes["d_head"])
            return project(self.atlas, z, layer, added)

    def sample(self, sites: Sequence[Site]) -> list[Tensor]:
        """Values of sites on a few ordinary tokens, the same every time."""
        from .checks.selfcheck import check_tokens

        run = self.run(check_tokens(self), read=tuple(sites), logits=False)
        return [run[site].plain for site in sites]
