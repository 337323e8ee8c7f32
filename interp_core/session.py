"""`Session`: a model that is open, with its tokenizer, its atlas and an engine; what runs and sweeps work on.

`Model` is this with verbs. What is below them (runs, generation, the check at load, sweeps) takes a session and knows
no `Model`, so that arrows run one way.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor

from . import text
from .architectures import atlas_of
from .architectures.atlas import Atlas, Shape
from .architectures.parameters import without_gradient
from .batches import laid_out
from .engines import make_engine
from .engines.protocol import Program
from .engines.turns import turn_of
from .errors import CapabilityError, TextError, wrong
from .loading import Opened
from .plan import Plan, several_edits, several_sites
from .sites import Edit, Site
from .snapshot import Snapshot, demand_usable, forgotten, take_again
from .strategy_checks import StrategyChecks
from .structure import Structure
from .text import Tokens, from_inputs
from .vision.places import with_visual_names
from .vision.processors import demand_fitting
from .vision.reading import demand_no_places, has_pictures, reader_of

Input = str | Sequence[str] | Tokens | Mapping[str, Any] | Tensor
"""What `run` and `generate` take: text, texts, tokens, a tokenizer's output, or ids `[batch pos]`."""
PROGRAMS = 64
"""Compiled plans that a session keeps."""
NOTHING = nullcontext()
PADDED = (
    "the ids begin or end with the model's padding id and come without an attention_mask, so padding counts as text: "
    "pass {'input_ids': ids, 'attention_mask': mask} (all ones, if it is text)"
)


class Session(Structure):
    """A model that is open.

    Attributes:
        hf: the Hugging Face model, unchanged between runs.
        tokenizer: its tokenizer, or None.
        processor: what makes pixels of images, or None; `no_processor` says why.
        atlas: which sites it has.
        strategy_checks: what trying strategies of sweeps on it gave.
        steps_wrong: what is wrong with the steps of a generation, of any row and of padded ones; "" for nothing, None
            before it was tried.
        turn: held while it runs; one for all models that share modules.
        snapshot: what it was like when it was opened, last.
        weightless: it has no weights here, as plans run where they are.
    """

    def __init__(self, opened: Opened, engine: str, engine_options: Mapping[str, Any]) -> None:
        self.hf, self.tokenizer, self.processor, self.source, self.no_processor = opened
        self._engine_made_of = engine, engine_options
        self.turn = turn_of(self.hf)
        with self.turn:
            self.reopen()

    def reopen(self) -> None:
        """Work out what there is of the model as it is now; for whoever holds the turn. What was compiled is forgotten.

        Raises:
            CapabilityError, LoadError, TextError: as `load`.
        """
        engine, options = self._engine_made_of
        take_again(self.hf)
        self.turn.demand_idle(dict(self.hf.named_modules()))
        self.weightless = is_remote(options) and all(weight.is_meta for weight in self.hf.parameters())
        demand_usable(self.hf, weightless=self.weightless)
        # cached properties, of the model as it was
        for name in ("heads", "keeps_logits", "told_positions", "without_cache", "first_position"):
            vars(self).pop(name, None)
        self.atlas: Atlas = atlas_of(self.hf)
        self._embedding = self.hf.get_input_embeddings()
        self._check_tokenizer()
        self.engine = make_engine(engine, self.hf, options)
        self.engine.adapt(self.atlas)
        if self.weightless:
            why = "the weights are where plans run, and not here"
            self.atlas.lacking["readout"] = why
            self.atlas.notes.append(f"{why}: nothing was checked")
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self.strategy_checks = StrategyChecks()
        self.steps_wrong: tuple[str, str] | None = None
        self._warned = False
        self._ends: str | None = None
        # An engine's copy shares the weights: who runs one holds off who would run the other.
        self.turn = turn_of(self.hf, self.engine.model)
        self.snapshot = Snapshot(self.hf, self.engine.model)

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
        size, rows = (len(self.tokenizer) if self.tokenizer is not None else 0), self.atlas.shape.n_ids
        if size > rows:
            raise TextError(
                f"the tokenizer has {size} tokens, the model {rows}: they do not belong together. Pass the tokenizer "
                "that the model was trained with."
            )
        demand_fitting(self.processor, self.hf.config)

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether its forward pass can leave out logits that nobody asked for."""
        return self.takes("logits_to_keep", by_name=True)

    @cached_property
    def told_positions(self) -> bool:
        """Whether its forward pass names positions among what it takes."""
        return self.takes("position_ids", by_name=True)

    def takes(self, argument: str, *, by_name: bool = False) -> bool:
        """Whether the model's forward pass can be handed an argument.

        Args:
            by_name: a forward that only hands on what it does not know counts as one that cannot.
        """
        known = inspect.signature(type(self.hf).forward).parameters
        return argument in known or (not by_name and any(each.kind is each.VAR_KEYWORD for each in known.values()))

    @cached_property
    def without_cache(self) -> dict[str, bool]:
        """What a pass that keeps no keys and values is called with; a user's own class may take nothing of the kind."""
        return {"use_cache": False} if self.takes("use_cache") else {}

    @cached_property
    def first_position(self) -> int:
        """The position that the model gives a text's first token: RoBERTa and its kin count from behind the padding id,
        others from where their table of positions begins, most from 0."""
        for path, module in self.hf.named_modules():
            if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return int(module.padding_idx) + 1
        tables = (table for path, table in self.hf.named_buffers() if path.endswith("embeddings.position_ids"))
        return next((int(table.flatten()[0]) for table in tables), 0)

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
            return self.input(texts)
        if images is None:
            tokens = text.encode(self._tokenizer(), texts, target, bos=bos, boundary=boundary)
            demand_no_places(tokens, self)
        else:
            tokens = reader_of(self).texts(texts, target, images, bos, boundary)
        return laid_out(self.atlas, self.fit(tokens))

    def chat(self, messages: Sequence[Mapping[str, Any]], target: str | None = None, **template: Any) -> Tokens:
        """Tokens of a conversation through the chat template, ready for an answer; see `text.encode_chat`. Parts of a
        message may be images, `{"type": "image", "image": …}` with what `tokens` takes for an image (or `"path"`).

        Raises:
            TextError, CapabilityError: as `text.encode_chat`, and for images as `tokens`.
        """
        if has_pictures(messages):
            return self.fit(reader_of(self).chat(messages, target, template))
        tokens = text.encode_chat(self._tokenizer(), messages, target, **template)
        return self.fit(demand_no_places(tokens, self))

    def word(self, token: int) -> str:
        """Text of one token id, its leading space included; the number where there is no tokenizer. Of a classifier,
        whose logits are of labels, the name of a label."""
        if isinstance(token, Tensor) and token.numel() == 1:
            token = token.item()
        if isinstance(token, (bool, Tensor)) or not hasattr(token, "__index__"):
            raise TextError(wrong("word", "a token id", token))
        if not 0 <= int(token) < self.atlas.shape.d_vocab:
            raise TextError(f"token id {token} does not exist: the model has {self.atlas.shape.d_vocab} tokens")
        if self.atlas.shape.n_labelled:
            return str(self.hf.config.id2label.get(int(token), token))
        return str(token) if self.tokenizer is None else text.token_text(self.tokenizer, int(token))

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise TextError(
                "this model was loaded without a tokenizer: pass ids, or load(..., tokenizer=…); on the command line, "
                "put a tokenizer.json into the model's folder"
            )
        return self.tokenizer

    def fit(self, tokens: Tokens, more: int = 0) -> Tokens:
        """The tokens, if they and so many new ones fit the model; it may have grown since it was opened.

        Raises:
            TextError: too long, or an id that the model does not have.
        """
        try:
            return demand_fit(self.atlas.shape, tokens, more)
        except TextError:
            with self.turn:
                if not self.renew():
                    raise
            return demand_fit(self.atlas.shape, tokens, more)  # it may have more tokens or a longer context by now

    def input(self, x: Input) -> Tokens:
        """What a user gave, as tokens.

        Raises:
            TextError: something else, or what does not fit the model.
        """
        if isinstance(x, Tokens):
            return x
        # One row of ids may come without the axis of rows.
        if isinstance(x, Tensor):
            x = {"input_ids": x if x.ndim == 2 else x[None]}
        if isinstance(x, Mapping):
            tokens = self.fit(from_inputs(x, self.tokenizer))
            if "attention_mask" not in x and not self._warned and looks_padded(self.hf.config, tokens.ids):
                self._warned = True
                warnings.warn(PADDED, stacklevel=4)  # where `run` or `generate` of the model is called
            return with_visual_names(tokens, self.hf.config, self.atlas.family)
        if isinstance(x, str) or (isinstance(x, Sequence) and not isinstance(x, (bytes, Tokens))):
            demand_no_ids(x)
            return self.tokens(x)
        raise TextError(wrong("a model", "text, texts, Tokens, a tokenizer's output or ids", x))

    def program(
        self, read: Iterable[Site | str] | Site | str = (), edits: Iterable[Edit] | Edit = ()
    ) -> tuple[Program, tuple[Any, ...], tuple[Edit, ...]]:
        """A plan compiled for this model, with its reads and edits. What was compiled last is kept, also for edits with
        other values: all that a program knows of an edit is its site and operation.

        Raises:
            SiteError, PlanError, CapabilityError: the plan does not fit the model.
        """
        reads = read if isinstance(read, tuple) else several_sites(read)
        changes = edits if isinstance(edits, tuple) else several_edits(edits)
        # By site and operation alone: a plan with other values is the same program. Reads are strings or sites as they
        # were given: parsing them would be most of what a plan that is known costs.
        key = (reads, tuple([(e.site, e.op) if isinstance(e, Edit) else None for e in changes]))
        try:
            known = self._programs.get(key)
        except TypeError:  # something that is no site, and has no hash
            known = None
        if known is None or None in key[1]:  # the plan says what is wrong with something that is no edit
            plan = Plan.of(reads, changes)
            with self.turn:
                self.renew()
                known = self._programs[key] = self.engine.compile(plan, self.atlas)
                if len(self._programs) > PROGRAMS:
                    self._programs.popitem(last=False)
        return known, reads, changes

    def demand_gradients(self) -> None:
        """Refuse gradients through layers that have none; the layers are asked once while the model stays as it is.

        Raises:
            CapabilityError: naming the first.
        """
        if self._ends is None:
            self._ends = without_gradient(self.hf, self.hf.dtype)
        if self._ends:
            raise CapabilityError(
                f"{self._ends} is computed by a kernel that autograd does not see through, so gradients would end "
                "there without a word; load the model with weights that are numbers, as in dtype=torch.bfloat16"
            )

    def fresh(self) -> AbstractContextManager[None]:
        """Forget, for a while, what earlier passes left on the model (position offsets of images)."""
        carried = self.atlas.family.carried
        return forgotten(self.engine.model, carried) if carried else NOTHING


def is_remote(options: Mapping[str, Any] | None) -> bool:
    """Whether an engine with these options runs plans on another machine."""
    return isinstance(options, Mapping) and options.get("remote") not in (None, False, "local")


def demand_fit(shape: Shape, tokens: Tokens, more: int) -> Tokens:
    """The tokens, if they and so many new ones fit a model.

    Raises:
        TextError: too long, or an id that the model does not have.
    """
    # Columns, not tokens: a model counts its positions over the holes of a mask too.
    longest = max(tokens.widths) + more
    if shape.n_ctx is not None and longest > shape.n_ctx:
        wanted = f"{longest - more} tokens and {more} new ones" if more else f"{longest} tokens"
        raise TextError(f"{wanted} do not fit the model's context of {shape.n_ctx}; shorten the text")
    top = int(tokens.ids.max())
    if top >= shape.n_ids or int(tokens.ids.min()) < 0:
        raise TextError(f"token id {top} does not exist: the model has {shape.n_ids} tokens")
    return tokens


def demand_no_ids(x: Any) -> None:
    """Refuse ids in lists, of which nobody could say whether rows of one length are meant, or a tensor was forgotten.

    Raises:
        TextError: how ids are given.
    """
    rows = [] if isinstance(x, str) else [row for row in x if isinstance(row, (list, tuple))]
    if rows and len(rows) == len(x) and len({*map(len, rows)}) > 1:
        each = "model.tokens({'input_ids': torch.tensor([row])})"
        raise TextError(f"{wrong('a model', 'ids as a tensor [batch pos]', x)}; for rows of several lengths write "
                        f"ic.Tokens.stack([{each} for row in rows])")  # fmt: skip
    if not isinstance(x, str) and len(x) and (rows or isinstance(x[0], int)):
        raise TextError(f"{wrong('a model', 'ids as a tensor [batch pos]', x)}; write torch.tensor(ids)")


def looks_padded(config: Any, ids: Tensor) -> bool:
    """Whether rows begin or end with the padding id, where that is not also one that text has."""
    config = config.get_text_config()
    pad, bos, eos = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    taken = pad in (bos, eos) or (isinstance(eos, list) and pad in eos)
    return pad is not None and not taken and bool((ids[:, [0, -1]] == pad).any())
