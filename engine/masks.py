"""Which tokens may come next in texts under a constraint: found while the model computes."""

from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future

from engine.constraint import TokenMask
from engine.request import InferenceError, Sequence
from engine.threads import mask_thread

# Of each running sequence: None where every token may come, or what ends that sequence alone.
Masks = list[TokenMask | InferenceError | None]


def begin_masks(seqs: SequenceOf[Sequence]) -> "Future[Masks]":
    """The masks of these sequences, in their order. They depend on the tokens that are there, not
    on logits: another thread finds them while the model runs."""
    if any(seq.params.constraint for seq in seqs):
        return mask_thread().submit(find_masks, list(seqs))
    nothing: Future[Masks] = Future()
    nothing.set_result([None] * len(seqs))
    return nothing


def find_masks(seqs: SequenceOf[Sequence]) -> Masks:
    return [find_mask(seq) for seq in seqs]


def find_mask(seq: Sequence) -> TokenMask | InferenceError | None:
    """The mask of a sequence's next token, or what keeps it from having one."""
    constraint = seq.params.constraint
    if constraint is None or seq.params.max_new_tokens == 0:
        return None
    try:
        if seq.matcher is None:
            seq.matcher = constraint.start()
        return seq.matcher.mask(seq.output_token_ids)
    except InferenceError as error:
        return error
    except Exception as error:
        failure = InferenceError("the mask of a sequence could not be found")
        failure.__cause__ = error
        return failure
