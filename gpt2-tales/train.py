"""Train `gpt2-tales`, the model bundled with this service, from one text file.

    python gpt2-tales/train.py corpus.txt

The corpus is plain text, one document after the other, separated by lines that
hold only `<|endoftext|>`. The run writes tokenizer, config and float16 weights
beside this file (or to `--out`), and a checkpoint every few minutes to
`--checkpoint`; started again with the same arguments it goes on where it was.

Recipe: hidden matrices are trained with Muon (Jordan et al., 2024), everything
else with AdamW; the learning rate rises for 60 steps, stays, and falls linearly
to zero over the second half. The last third of the epochs sees the full context
of 512 tokens, the epochs before it half of that: attention is a third of the cost
of a step on a CPU. On Linux, `MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=8000000000` in the environment saves the system from
mapping the same large buffers anew at every step: half as fast again on two cores.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CONTEXT_TOKENS = 512
HELD_OUT_EVERY = 50  # documents; whole ones, so that no held-out tale is half seen
TOKENS_PER_STEP = 8192
WARMUP_STEPS = 60
CHECKPOINT_STEPS = 100


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 8,192 tokens; id 0 is `<|endoftext|>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=8192,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one int64 stream of token ids, `<|endoftext|>` before each."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents):
        ids += [tokenizer.eos_token_id, *encoding.ids]
    return torch.tensor(ids)


def epoch_batches(stream: torch.Tensor, context_tokens: int, seed: int) -> torch.Tensor:
    """(steps, batch, context_tokens + 1) ids: the stream cut at a random offset, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(context_tokens, (1,), generator=generator))
    rows = stream[offset:].unfold(0, context_tokens + 1, context_tokens)
    batch = TOKENS_PER_STEP // context_tokens
    steps = len(rows) // batch
    order = torch.randperm(len(rows), generator=generator)[: steps * batch]
    return rows[order].view(steps, batch, context_tokens + 1)


def mean_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy in nats of ids[:, 1:] given what stands before, a scalar."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.transformer(ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: GPT2LMHeadModel, stream: torch.Tensor, num_bytes: int) -> float:
    """Held-out loss: all tokens of the stream, in windows of the full context."""
    model.eval()
    nats = 0.0
    for start in range(0, len(stream) - 1, CONTEXT_TOKENS):
        window = stream[start : start + CONTEXT_TOKENS + 1][None]
        nats += mean_loss(model, window).item() * (window.shape[1] - 1)
    model.train()
    return nats / math.log(2) / num_bytes


def learning_rate_factor(step: int, num_steps: int) -> float:
    """In [0, 1]: linear warm-up, a plateau, then linearly to zero over the second half."""
    return min(1.0, (step + 1) / WARMUP_STEPS, 2 * (num_steps - step) / num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--checkpoint", type=Path, default=Path("gpt2-tales-checkpoint.pt"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    documents = [text.strip() for text in args.corpus.read_text().split(END_OF_TEXT)]
    held_out = documents[::HELD_OUT_EVERY]
    training = [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(training)
    training_stream = encode(tokenizer, training).to(device)
    held_out_stream = encode(tokenizer, held_out).to(device)
    held_out_bytes = sum(len(text.encode()) for text in held_out)
    print(
        f"{len(training)} documents, {len(training_stream):,} tokens an epoch; "
        f"held out: {len(held_out)} documents, {held_out_bytes:,} bytes"
    )

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT_TOKENS,
        n_embd=256,
        n_layer=6,
        n_head=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Nothing is seen more than a few times: there is nothing to regularise.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # `gelu_new`, which the saved config names, as one fused operation.
        activation_function="gelu_pytorch_tanh",
    )
    model = GPT2LMHeadModel(config).to(device)
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [group["lr"] for opt in optimizers for group in opt.param_groups]

    contexts = [
        CONTEXT_TOKENS if 3 * (epoch + 1) > 2 * args.epochs else CONTEXT_TOKENS // 2
        for epoch in range(args.epochs)
    ]
    epochs = [
        epoch_batches(training_stream, context, seed=args.seed + epoch)
        for epoch, context in enumerate(contexts)
    ]
    num_steps = sum(len(batches) for batches in epochs)

    first_step = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        first_step = state["step"]

    def save_checkpoint(step: int) -> None:
        partial = args.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "step": step,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            },
            partial,
        )
        partial.replace(args.checkpoint)  # never leaves half a checkpoint

    steps = (batch for batches in epochs for batch in batches)
    progress = tqdm(steps, total=num_steps, unit="step")
    for step, ids in enumerate(progress):
        if step < first_step:
            continue
        factor = learning_rate_factor(step, num_steps)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * factor
        loss = mean_loss(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % CHECKPOINT_STEPS == 0:
            save_checkpoint(step + 1)
        if (step + 1) % (5 * CHECKPOINT_STEPS) == 0:
            bpb = bits_per_byte(model, held_out_stream, held_out_bytes)
            progress.write(f"step {step + 1}: {bpb:.4f} held-out bits per byte")

    model.half().float()  # measure what is shipped: the weights as rounded to float16
    bpb = bits_per_byte(model, held_out_stream, held_out_bytes)
    print(f"{bpb:.4f} held-out bits per byte after {num_steps} steps")
    model.config.activation_function = "gelu_new"
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
