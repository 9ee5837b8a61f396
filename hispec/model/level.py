"""What the engine asks of a level, and the two kinds there are.

    Exit        a boundary of the target's cache and the head there; at L the target itself
    Separate    a smaller model of the same vocabulary, with a cache of its own

An exit runs on the states of the boundary below it. A separate model shares no states: it embeds
the tokens itself, and knows of the text what it was last asked about. Its cache has the same slots
as the target's, so rejecting works alike for both (``truncate``, ``keep``), and the next time it
runs it catches up on all that was committed without it.

Levels below the target only draft. What a separate model computes never reaches the output, so it
may be any Llama whose ids mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hispec.errors import UsageError
from hispec.model.cache import Cache
from hispec.model.checkpoint import Checkpoint, open_checkpoint
from hispec.model.exits import ExitHead, SharedHead, TrainedHead
from hispec.model.llama import Llama, raised
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Found, Lift, Token
from hispec.model.ready import ready


class Level(Protocol):
    """An exit, a separate model, or the target.

    Attributes:
        model: whose layers it runs.
        context: of that model, in tokens; a longer text goes on without the level.
        cache: what it knows of the text.
        boundary: its own in the cache: ``layers[0:boundary]`` have run.
        head: from the states there to logits.
        asynchronous: see :class:`~hispec.model.passes.Passes`.
    """

    asynchronous: bool
    model: Llama
    context: int
    cache: Cache
    boundary: int
    head: ExitHead

    @property
    def read(self) -> int:
        """Slots of the text that it has read; what follows it reads when it runs next."""
        ...

    def run(
        self,
        tokens: Sequence[Token],
        first: int,
        end: int,
        nodes: Nodes,
        asked: Asked | None = None,
    ) -> tuple[Found, int]:
        """Runs the level over all slots it lacks; returns logits, and the layer visits it took.

        Args:
            tokens: ids by slot, from 0 on.
            first: slot of the first row of logits wanted.
            end: a slot, exclusive.
            nodes: the round's tree.
            asked: the best ids would do.

        Returns:
            Logits after the slots ``first`` … ``end - 1``, (T, V) or (T, V_r), and the visits.
            Where the head finds what is asked by itself, ids and odds instead, (T, k) each, which
            hold until anything else is run.
        """
        ...

    def keep(self, root: int, kept: Sequence[int]) -> None:
        """After the call the level knows the tree's nodes ``kept`` alone; see ``Llama.keep``."""
        ...


class Exit:
    """An exit of the target or, at L, the target: a boundary of the cache they share.

    The cache is the target's to keep; an exit's own is what its head stores.
    """

    def __init__(self, model: Llama, cache: Cache, boundary: int, head: ExitHead) -> None:
        self.model = model
        self.context = model.config.max_positions
        self.asynchronous = model.narrow.asynchronous
        self.cache = cache
        self.boundary = boundary
        self.head = head

    @property
    def read(self) -> int:
        """See :class:`Level`."""
        return slots_read(self.head) or 0

    def run(
        self,
        tokens: Sequence[Token],
        first: int,
        end: int,
        nodes: Nodes,
        asked: Asked | None = None,
    ) -> tuple[Found, int]:
        """See :class:`Level`. The visits are those of the layers no level below has run."""
        lifts, visits = self.model.lifts(self.cache, tokens, end, self.boundary, nodes=nodes)
        return _found(self.model, self.head, self.cache, first, end, nodes, asked, lifts), visits

    def keep(self, root: int, kept: Sequence[int]) -> None:
        """See :class:`Level`."""
        if self.boundary == self.cache.boundaries[-1]:
            self.model.keep(self.cache, root, kept)
        moved = next((new for new, node in enumerate(kept) if new != node), len(kept))
        self.head.truncate(root + moved)


class Separate:
    """A smaller model, from text to text.

    What it lacks of a prompt it runs as a prefill does, when it is first asked: a text in which it
    never pays costs nothing. That time is decoding's; the visits, like a target's prefill, are not
    counted. Everything later runs in narrow passes, as the target's does: the target itself, opened
    as a level of its own, is always right.

    Attributes:
        cache: keys, values and last states of a beginning of the text.
        prompt: slots of the text's prompt.
        fingerprint: of its weights.
    """

    def __init__(self, model: Llama, fingerprint: str = "") -> None:
        self.model = model
        self.context = model.config.max_positions
        self.asynchronous = model.narrow.asynchronous
        self.boundary = model.config.num_layers
        self.cache = model.new_cache([self.boundary])
        self.head: ExitHead = SharedHead(model, self.boundary)
        self.prompt = 0
        self.fingerprint = fingerprint

    @property
    def read(self) -> int:
        """See :class:`Level`."""
        return self.cache.length

    @staticmethod
    def open(path: str, target: Checkpoint, model: Llama) -> Separate:
        """Returns the model ready to draft for a target, in its dtype and on its device.

        Args:
            path: as ``--model`` takes it.
            target: the target's checkpoint.
            model: the target.

        Raises:
            UsageError: its ids do not mean the same.
            CheckpointError: it cannot be found, read or understood.
        """
        checkpoint = open_checkpoint(path)
        check_vocabulary(checkpoint, target)
        context = min(checkpoint.config.max_positions, model.config.max_positions)
        own = ready(checkpoint, model.dtype, model.device, exact=model.exact, context=context)
        return Separate(own, checkpoint.fingerprint)

    def run(
        self,
        tokens: Sequence[Token],
        first: int,
        end: int,
        nodes: Nodes,
        asked: Asked | None = None,
    ) -> tuple[Found, int]:
        """See :class:`Level`. The visits are those of its own layers, whatever their size."""
        model, cache, visits = self.model, self.cache, 0
        if cache.length < self.prompt:
            model.prefill(cache, tokens[: self.prompt])
        while end - cache.length > MAX_WIDTH:
            upto = cache.length + MAX_WIDTH
            visits += model.advance(cache, tokens, upto, self.boundary, nodes=nodes)
        lifts, more = model.lifts(cache, tokens, end, self.boundary, nodes=nodes)
        return _found(model, self.head, cache, first, end, nodes, asked, lifts), visits + more

    def keep(self, root: int, kept: Sequence[int]) -> None:
        """See :class:`Level`."""
        self.model.keep(self.cache, root, kept)


def slots_read(head: ExitHead) -> int | None:
    """Returns how many slots of the text a head has read; None if it remembers nothing."""
    if not isinstance(head, TrainedHead) or head.block is None:
        return None
    return head.final if head.context else head.known


def _found(
    model: Llama,
    head: ExitHead,
    cache: Cache,
    first: int,
    end: int,
    nodes: Nodes,
    asked: Asked | None,
    lifts: Sequence[Lift],
) -> Found:
    with raised(cache, head.exit_layer, end, lifts):
        if asked:
            return head.best(cache, first, nodes, asked, lifts)
        model.run(lifts)
        return head.logits(cache, first, nodes)


def check_vocabulary(checkpoint: Checkpoint, target: Checkpoint) -> None:
    """Raises ``UsageError`` unless every id means the same to both.

    Args:
        checkpoint: of a model that is to draft.
        target: of the model it is to draft for.

    Raises:
        UsageError: a token or the number of ids differs, or one of them has no tokenizer.
    """
    name, advice = checkpoint.name, "Use a model that was made with the target's tokenizer."
    if target.tokenizer is None:
        raise UsageError(
            f"{target.name} has no tokenizer, so nobody knows whether {name} has the same. Copy "
            f"tokenizer.json into its folder, or drop the level."
        )
    theirs, ours = (x.tokenizer.get_vocab() for x in (checkpoint, target))
    if theirs != ours:
        a, b = ({token_id: token for token, token_id in x.items()} for x in (theirs, ours))
        first = min(i for i in {*a, *b} if a.get(i) != b.get(i))
        there, here = (repr(x[first]) if first in x else "no token" for x in (a, b))
        raise UsageError(
            f"the tokenizer of {name} differs from that of {target.name}: token {first} is {there} "
            f"to the first and {here} to the second. {advice}"
        )
    sizes = checkpoint.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{name} has a vocabulary of {sizes[0]} ids and {target.name} one of {sizes[1]}. "
            f"{advice}"
        )
