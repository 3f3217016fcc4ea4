"""Split-and-Privatize in one readable loop: the customer's side, without resumption, micro-batches or a run folder.

    veiltune vendor init --state /tmp/vendor && veiltune vendor tenant add me --state /tmp/vendor
    veiltune vendor serve /tmp/vendor/vendor.toml &
    python examples/split_loop.py 127.0.0.1:50051 /tmp/vendor/tenants/me

Expected: the loss falls from about 0.7 to below 0.5 and the last line reads like `accuracy 0.9 on 20 sentences`. With
so few sentences it varies; what matters is what crossed the wire: noisy vectors once, outputs and their gradients
every step. `veiltune tune` is this loop with a ledger, an outbox and checkpoints.

Source: Shen et al. 2023, arXiv:2312.15603 (SAP); labels: randomised response, Warner 1965.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
from pathlib import Path

import torch

from veiltune.customer.batching import encode_texts, epoch_batches, pad_ids
from veiltune.customer.remote import RemoteJob, VendorClient, ragged
from veiltune.models.bundle import read_bundle
from veiltune.privatize.labels import corrected_cross_entropy, flip_matrix, randomize_labels
from veiltune.privatize.mechanisms import make_privatizer
from veiltune.randomness import SecureGenerator
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import PROTOCOL, to_wire, unpad

CUT_LAYER, NOISE_TO_NORM, LABEL_EPSILON = 1, 0.3, 3.0
EPOCHS, BATCH_SIZE, LEARNING_RATE = 20, 8, 2e-3

SUBJECTS = ("The food", "Our room", "The service", "This film", "The new phone")
GOOD = ("was wonderful", "is a joy", "made us very happy", "could not be better")
BAD = ("was awful", "is a waste of money", "made us angry", "could not be worse")
TEXTS = [f"{subject} {verdict}." for verdict in GOOD + BAD for subject in SUBJECTS]
LABELS = torch.tensor([1] * 20 + [0] * 20)
TRAIN, TEST = list(range(0, 40, 2)), list(range(1, 40, 2))


def main(address: str, credentials: str) -> float:
    """Trains and evaluates; returns the accuracy."""
    generator = SecureGenerator()  # ChaCha20, keyed by the operating system
    train = [TRAIN[i] for i in generator.uniform((len(TRAIN),)).argsort()]  # the table's order would tell its labels
    client = VendorClient(address, credentials=Path(credentials))

    # 1. The vendor discloses the bottom of its model: embeddings and CUT_LAYER blocks.
    with tempfile.TemporaryDirectory() as folder:
        client.get_bottom(pb.GetBottomRequest(cut_layer=CUT_LAYER, cut_embeddings="word"), Path(folder))
        bundle = read_bundle(Path(folder))
    bottom = bundle.bottom.eval()

    # 2. Text -> representations -> noise, once. From here on only `released` is used: epochs cost nothing more.
    token_ids = encode_texts(bundle.tokenizer, TEXTS, max_length=32)
    lengths = [len(ids) for ids in token_ids]
    ids, mask = pad_ids(token_ids)
    with torch.no_grad():
        clean = unpad(bottom(ids, mask), mask)  # (tokens, hidden)
    reference = float(clean.norm(dim=-1).mean())
    privatizer = make_privatizer("d_chi", dim=bottom.hidden_size, reference_norm=reference, noise_to_norm=NOISE_TO_NORM)
    noisy = privatizer.privatize(clean, generator=generator)
    released = list(noisy.split(lengths))

    # 3. Labels: randomised response, once; the loss below is corrected for it.
    answers = randomize_labels(LABELS, num_classes=2, epsilon=LABEL_EPSILON, generator=generator)
    flips = flip_matrix(2, LABEL_EPSILON)

    # 4. A job at the vendor: LoRA on the blocks above the cut, and a classification head.
    opened = client.call(
        "OpenJob",
        pb.OpenJobRequest(
            key=secrets.token_hex(16),
            spec=pb.JobSpec(
                protocol=PROTOCOL,
                cut_layer=CUT_LAYER,
                cut_embeddings="word",
                head="vendor",
                num_labels=2,
                frozen_bottom=True,
                method="lora",
                rank=8,
                alpha=16.0,
                adapter_size=64,
                wire_dtype=pb.DTYPE_BFLOAT16,
                norm_bound=1e4,
                max_tokens=32,
                precision="fp32",
            ),
        ),
    )
    job = RemoteJob(client, opened.job, next_seq=opened.next_seq, output_size=2)
    print(f"the vendor trains {opened.trainable_parameters:,} of {opened.total_parameters:,} parameters")

    # 5. One upload of the training rows; then only outputs come and only output gradients go.
    rows = ragged(*to_wire(torch.cat([released[i] for i in train]), pb.DTYPE_BFLOAT16), [lengths[i] for i in train])
    client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=rows)])
    step = 0
    for epoch in range(EPOCHS):
        for batch in epoch_batches([lengths[i] for i in train], batch_size=BATCH_SIZE, seed=0, epoch=epoch):
            outputs = job.send_forward(step=step, micro_batch=0, rows=batch).outputs()  # (B, 2), from the vendor
            loss = corrected_cross_entropy(outputs, answers[[train[i] for i in batch]], flips).mean()
            loss.backward()  # sends the gradient of the outputs
            job.send_optim_step(step=step, learning_rate=LEARNING_RATE)
            step += 1
        if epoch % 5 == 0:
            print(f"epoch {epoch:2d}  loss {loss.item():.3f}")

    # 6. Inference, under the same mechanism.
    frame = ragged(*to_wire(torch.cat([released[i] for i in TEST]), pb.DTYPE_BFLOAT16), [lengths[i] for i in TEST])
    accuracy = float((job.predict(frame).argmax(dim=-1) == LABELS[TEST]).float().mean())
    print(f"accuracy {accuracy:.2f} on {len(TEST)} sentences; {client.bytes_up:,} bytes up, {client.bytes_down:,} down")
    job.close(erase=True)
    client.close()
    return accuracy


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: split_loop.py HOST:PORT CREDENTIALS_FOLDER")
    main(*sys.argv[1:3])
