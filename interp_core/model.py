"""`load` and `Model`: the one object that users hold."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import loading, text
from .architectures import atlas_of
from .architectures.atlas import Atlas
from .batches import BATCH, laid_out
from .compiled import NOTHING, CompiledPlan, Each, demand_fit, tokens_of
from .edits import Edit
from .engines import make_engine
from .engines.protocol import Program
from .engines.turns import turn_of
from .errors import CapabilityError, PlanError, SiteError, TextError, several, wrong
from .plan import Plan
from .positions import PositionLike
from .selfcheck import Check, check_atlas
from .sites import Site
from .snapshot import Snapshot, demand_usable, forgotten
from .structure import Structure
from .text import Tokens
from .trace import Run
from .vision.places import VisualToken, visual_grid
from .vision.processors import demand_fitting
from .vision.reading import demand_no_places, has_pictures, reader_of

if TYPE_CHECKING:
    from .activations import Activations
    from .engines.replace import Rule
    from .generation import Generation
    from .score import Score
    from .sweep import Sweep
    from .sweep_plan import Trial

Input = str | Sequence[str] | Tokens | Mapping[str, Any] | Tensor
"""What `run` and `generate` take: text, texts, tokens, a tokenizer's output, or ids `[batch pos]`."""
PROGRAMS = 64


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
        device: default CUDA if there is one, else CPU. Or a `device_map` for accelerate.
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
        tokenizer=tokenizer,
        processor=processor,
        dtype=dtype,
        device=device,
        device_map=device_map,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return Model(opened, engine=engine, engine_options=engine_options, check=check)


class Model(Structure):
    """A language model whose inside can be named, read and changed.

    Attributes:
        hf: the Hugging Face model, unchanged between runs.
        tokenizer: its tokenizer, or None.
        processor: what makes pixels of images, or None; `no_processor` says why.
        atlas: which sites it has.
        check: what the self-check at load found (None without check).
        tried: strategies of sweeps that were tried on this model, and what was wrong with them ("" if nothing).
        trials: what trying them took.
        turn: held while it runs; one for all models that share modules.
        snapshot: what it was like when it was opened, last.
    """

    def __init__(
        self,
        opened: loading.Opened,
        *,
        engine: str = "torch",
        engine_options: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> None:
        self.hf, self.tokenizer, self.processor, self.source, self.no_processor = opened
        self._made = engine, {} if engine_options is None else engine_options, check
        self.turn = turn_of(self.hf)
        with self.turn:
            self.reopen()

    def reopen(self) -> None:
        """Work out what there is of the model as it is now; for whoever holds the turn. What was compiled is forgotten.

        Raises:
            CapabilityError, LoadError, TextError: as `load`.
        """
        engine, options, check = self._made
        self.turn.demand_idle(dict(self.hf.named_modules()))
        demand_usable(self.hf)
        for name in ("heads", "keeps_logits"):
            vars(self).pop(name, None)
        self.atlas: Atlas = atlas_of(self.hf)
        self._embedding = self.hf.get_input_embeddings()
        self._check_tokenizer()
        self.engine = make_engine(engine, self.hf, options)
        self.engine.adapt(self.atlas)
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self.tried: dict[str, str] = {}
        self.trials: dict[str, list[Trial]] = {}
        self._warned = False
        self.turn = turn_of(self.hf, self.engine.model)
        self.snapshot = Snapshot(self.hf, self.engine.model)
        try:
            self.check: Check | None = check_atlas(self) if check else None
        except BaseException:
            self.snapshot.forget()
            raise

    def renew(self) -> bool:
        """Open it again if any of its modules has changed; for whoever holds the turn. Whether it was.

        Raises:
            CapabilityError, LoadError, TextError: it has become one that `load` refuses.
        """
        changed = self.snapshot.stale(self.snapshot.modules)
        if changed:
            self.reopen()
        return changed

    def _check_tokenizer(self) -> None:
        size, rows = (len(self.tokenizer) if self.tokenizer is not None else 0), self.atlas.shape.d_vocab
        if size > rows:
            raise TextError(
                f"the tokenizer has {size} tokens, the model {rows}: they do not belong together. Pass the tokenizer "
                "that the model was trained with."
            )
        demand_fitting(self.processor, self.hf.config)

    def __repr__(self) -> str:
        shape = self.atlas.shape
        return (
            f"Model({self.source!r}, {self.atlas.family.name}, {shape.n_layers} layers, d_model {shape.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, engine {self.engine.name})"
        )

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether its forward pass can leave out logits that nobody asked for."""
        return "logits_to_keep" in inspect.signature(type(self.hf).forward).parameters

    def fingerprint(self) -> str:
        """Sixteen digits that stand for all in which this model's numbers may differ from another's: all its weights
        and buffers, config, modules, dtype, attention, engine and the packages' versions. Weights are read once while
        they stay as they are.

        Raises:
            CapabilityError: something of it cannot be told, such as weights that are not here.
        """
        from .identity import NoIdentityError, identity, model_parts

        try:
            return identity(model_parts(self))[:16]
        except NoIdentityError as error:
            raise CapabilityError(f"this model has no fingerprint: {error}") from error

    def on(self, engine: str, **options: Any) -> Model:
        """The same model on another engine, weights shared.

        Raises:
            CapabilityError: as `load`.
        """
        opened = loading.Opened(self.hf, self.tokenizer, self.processor, self.source, self.no_processor)
        return Model(opened, engine=engine, engine_options=options)

    def tokens(
        self,
        texts: str | Sequence[str] | Mapping[str, Any],
        target: str | Sequence[str] | None = None,
        *,
        images: Any = None,
        bos: bool | None = None,
        boundary: str = "strict",
    ) -> Tokens:
        """Tokens of a text or several, with the spans `prompt` and `target` if a target is given; see `text.encode`.
        Of what a tokenizer or processor returned (images), they are its ids, with the spans of what is seen.

        Args:
            images: of a text, an image (PIL, path, array of uint8 `[height width 3]`) or several; of several texts, a
                list with those of each. They take the places in the text (`processor.image_token`), or come first. The
                spans `vision`, `text`, `image_0`, … say where, and `question` what the text says after them.

        Raises:
            TextError: empty, too long, a boundary inside a token, an image that cannot be read or has no place.
            CapabilityError: images, and no processor or no Pillow.
        """
        if isinstance(texts, Mapping):
            if (target, images, bos, boundary) != (None, None, None, "strict"):
                raise TextError(
                    "what a processor returned is tokens already; put the target into its text, before that"
                )
            return self._input(texts)
        if images is None:
            tokens = text.encode(self._tokenizer(), texts, target, bos=bos, boundary=boundary)
            demand_no_places(tokens, self)
        else:
            tokens = reader_of(self).texts(texts, target, images, bos, boundary)
        return laid_out(self.atlas, self._fitting(tokens))

    def chat(self, messages: Sequence[Mapping[str, Any]], target: str | None = None, **template: Any) -> Tokens:
        """Tokens of a conversation through the chat template, ready for an answer; see `text.encode_chat`. Parts of a
        message may be images, `{"type": "image", "image": …}` with what `tokens` takes for an image (or `"path"`).

        Raises:
            TextError, CapabilityError: as `text.encode_chat`, and for images as `tokens`.
        """
        if has_pictures(messages):
            return self._fitting(reader_of(self).chat(messages, target, template))
        tokens = text.encode_chat(self._tokenizer(), messages, target, **template)
        return self._fitting(demand_no_places(tokens, self))

    def visual_grid(self, x: Input) -> list[list[VisualToken]]:
        """Per row, which image, grid cell and pixels each visual token stands for.

        Args:
            x: what a processor returned (or `Tokens` of it).

        Raises:
            CapabilityError: a family whose grids are not known, or videos.
            TextError: no images, or placeholders that do not fit them.
        """
        return visual_grid(self._input(x), self.hf.config, self.atlas.family)

    def word(self, token: int) -> str:
        """Text of one token id, its leading space included; the number where there is no tokenizer."""
        if isinstance(token, Tensor) and token.numel() == 1:
            token = token.item()
        if isinstance(token, (bool, Tensor)) or not hasattr(token, "__index__"):
            raise TextError(wrong("word", "a token id", token))
        if not 0 <= int(token) < self.atlas.shape.d_vocab:
            raise TextError(f"token id {token} does not exist: the model has {self.atlas.shape.d_vocab} tokens")
        return str(token) if self.tokenizer is None else text.token_text(self.tokenizer, int(token))

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise TextError("this model was loaded without a tokenizer: pass ids, or load(..., tokenizer=…)")
        return self.tokenizer

    def _fitting(self, tokens: Tokens, more: int = 0) -> Tokens:
        try:
            return demand_fit(self.atlas.shape, tokens, more)
        except TextError:
            with self.turn:
                if not self.renew():
                    raise
            return demand_fit(self.atlas.shape, tokens, more)  # it may have more tokens or a longer context by now

    def _input(self, x: Input) -> Tokens:
        return x if isinstance(x, Tokens) else tokens_of(self, x)

    # Running

    def run(
        self,
        x: Input,
        read: Iterable[Site | str] | Site | str = (),
        edits: Iterable[Edit] | Edit = (),
        *,
        grad: Callable[[Tensor], Tensor] | bool = False,
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
            grad: a function of the logits `[batch pos d_vocab]` that returns one number: `run.grad[site]` is then its
                gradient with respect to every site read. True keeps the graph for your own `backward`. Where an
                edit's value requires grad, the graph is kept anyway. Weights get no gradient.
            logits: False ends the pass after the last site read; a position computes only these logits.
            each: called as `each(layer, values)` when all that is read of a layer has passed, which is then let go.
            attention: hand `each` the layer's attention too: `values.attention` gives rows of its pattern, also after
                the run (`AttentionRows`), where `can("pattern", "rows")` has nothing against it.
            allow_noop: let edits pass that changed nothing.

        Raises:
            SiteError, PositionError, PlanError, CapabilityError, TextError: before the forward pass.
            EffectError: an edit did nothing.
        """
        plan = self.compile(read, edits)
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
        self, x: Input, variants: Iterable[Edit | Sequence[Edit]], score: Score, *, strategy: str = "auto",
        memory_budget: int | None = None, out: str | Path | None = None, progress: bool = False,
    ) -> Sweep: ...  # fmt: skip

    @overload
    def sweep(
        self, x: Input, variants: Iterable[Edit | Sequence[Edit]], score: Sequence[Score], *, strategy: str = "auto",
        memory_budget: int | None = None, out: str | Path | None = None, progress: bool = False,
    ) -> tuple[Sweep, ...]: ...  # fmt: skip

    def sweep(
        self,
        x: Input,
        variants: Iterable[Edit | Sequence[Edit]],
        score: Score | Sequence[Score],
        *,
        strategy: str = "auto",
        memory_budget: int | None = None,
        out: str | Path | None = None,
        progress: bool = False,
    ) -> Sweep | tuple[Sweep, ...]:
        """Run many variants of a text, each with its own edits, and score them: exactly what one run per variant gives,
        for the price of what each changes; see `sweep` for how.

        Args:
            x: as in `run`; each row of a batch is swept.
            variants: what to change, an edit or several per variant.
            score: `ic.score.logprob(target)` and so on; of several that read the same place, each gets its own `Sweep`
                of the same passes.
            strategy: "auto" takes the cheapest that is exact here. "full" is one forward pass per variant, "batched"
                many variants per pass, "restart" leaves out layers below the first edited one, "prefix" positions
                before it, "staircase" both.
            memory_budget: bytes that one pass may take (default: half of what is free).
            out: a folder for the scores as they come; a sweep that was stopped goes on there.
            progress: show from the beginning how much is done, on standard error; else from three seconds on.

        Raises:
            SiteError, PositionError, PlanError, CapabilityError: before anything runs.
            LoadError: the folder holds something else.
        """
        from .score import Score
        from .sweep import checked, sweep

        listed, scores = checked(variants, score, memory_budget, out)
        with torch.inference_mode(False):  # what is kept for later runs serves those with gradients too
            with self.turn:
                self.renew()
            found = sweep(self, x, listed, scores, strategy, memory_budget, out, progress)
        return found[0] if isinstance(score, Score) else found

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
        reads = read if isinstance(read, tuple) else (read,) if isinstance(read, (Site, str)) else None
        reads = several("read=", "sites", read, PlanError) if reads is None else reads
        changes = edits if isinstance(edits, tuple) else (edits,) if isinstance(edits, Edit) else None
        changes = several("edits=", "edits", edits, PlanError) if changes is None else changes
        key = (reads, tuple([(e.site, e.op) if isinstance(e, Edit) else None for e in changes]))
        try:
            found = self._programs.get(key)
        except TypeError:  # something that is no site, and has no hash
            found = None
        if found is None or None in key[1]:
            plan = Plan.of(reads, changes)
            with self.turn:
                self.renew()
                found = self._programs[key] = self.engine.compile(plan, self.atlas)
                if len(self._programs) > PROGRAMS:
                    self._programs.popitem(last=False)
        return CompiledPlan(self, found, reads, changes)

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
        from .selfcheck import probe_ids

        run = self.run(probe_ids(self), read=tuple(sites), logits=False)
        return [run[site].plain for site in sites]

    def fresh(self) -> AbstractContextManager[None]:
        """Forget, for a while, what earlier passes left on the model (position offsets of images)."""
        carried = self.atlas.family.carried
        return forgotten(self.engine.model, carried) if carried else NOTHING
