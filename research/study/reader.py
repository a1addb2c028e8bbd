"""The reader that stands in for a language model: it answers questions about visual tokens, and reconstructs patches.

It is pretrained on descriptions in words (`learn_descriptions`), so that every projector starts with the same trained
reader, which has not seen any projector's tokens. Shapes are named as in resampler_ms_resampler.py; Q is the number
of questions of an image, W their words, L the answers or labels.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ms_resampler.branches_ms_resampler import merge_heads, split_heads
from ms_resampler.places_ms_resampler import sincos_positions
from ms_resampler.tiny.scenes import HEIGHTS

from .data import BATCH, LABELS, WORDS_AT_MOST, Optimiser, StudyData, patch_loss, save_whole

WIDTH, HEADS, DEPTH = 96, 4, 2
READER = "reader.safetensors"
QUESTIONS, PROBES = 8, 32  # questions and patches per image in one training step


class ReaderBlock(nn.Module):
    """States of an image's questions attend to each other (if there are several) and to the visual tokens."""

    def __init__(self, words: bool):
        super().__init__()
        if words:
            self.word_norm = nn.LayerNorm(WIDTH)
            self.word_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.ffn = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, z_BQWD: Tensor, y_BMD: Tensor, hidden_BQW: Tensor | None = None) -> Tensor:
        """`hidden_BQW` is -inf where there is no word; without it, states do not attend to each other."""
        if hidden_BQW is not None:
            z = z_BQWD.flatten(0, 1)
            h = self.word_norm(z)
            z = z + self.word_attention(h, h, h, key_padding_mask=hidden_BQW.flatten(0, 1), need_weights=False)[0]
            z_BQWD = z.view_as(z_BQWD)
        query = split_heads(self.q_proj(self.norm(z_BQWD)).flatten(1, 2), HEADS)
        key, value = (split_heads(project(y_BMD), HEADS) for project in (self.k_proj, self.v_proj))
        out = merge_heads(F.scaled_dot_product_attention(query, key, value))
        z_BQWD = z_BQWD + self.o_proj(out).view_as(z_BQWD)
        return z_BQWD + self.ffn(z_BQWD)


class Reader(nn.Module):
    """Answers questions (their content words) by classification over all answers, and names what is under a patch."""

    def __init__(self, words: int, answers: int):
        super().__init__()
        self.token_norm = nn.LayerNorm(WIDTH)
        self.word_embedding = nn.Embedding(words, WIDTH)
        self.order = nn.Parameter(torch.randn(1 + WORDS_AT_MOST, WIDTH) / 2)
        self.blocks = nn.ModuleList(ReaderBlock(words=True) for _ in range(DEPTH))
        self.answer = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, answers))
        self.probe_block = ReaderBlock(words=False)
        self.label = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(LABELS.values())))

    def place(self, y_BMD: Tensor, points: Tensor) -> Tensor:
        """Visual tokens at unit scale with position codes of (y, x), (M, 2) or (B, M, 2)."""
        codes = sincos_positions(points.flatten(0, -2), WIDTH).unflatten(0, points.shape[:-1])
        return self.token_norm(y_BMD) + codes

    def forward(self, y_BMD: Tensor, words_BQW: Tensor) -> Tensor:
        """Logits of the answers (B, Q, L); word 0 is padding. The answer is read from a state before the words."""
        z_BQWD = F.pad(self.word_embedding(words_BQW), (0, 0, 1, 0)) + self.order[: 1 + words_BQW.shape[-1]]
        hidden_BQW = F.pad(torch.zeros(words_BQW.shape).masked_fill(words_BQW.cpu() == 0, -torch.inf), (1, 0))
        for block in self.blocks:
            z_BQWD = block(z_BQWD, y_BMD, hidden_BQW.to(y_BMD.device))
        return self.answer(z_BQWD[:, :, 0])

    def probe(self, y_BMD: Tensor, points_BP2: Tensor) -> Tensor:
        """Logits of name and colour, side by side, of what is under patches with these centres (y, x): (B, P, L).

        Points (1, P, 2) are those of all pictures.
        """
        codes_BPD = sincos_positions(points_BP2, WIDTH)
        states = codes_BPD[:, :, None].expand(len(y_BMD), -1, -1, -1)
        return self.label(self.probe_block(states, y_BMD)[:, :, 0])


class Description(nn.Module):
    """Tokens for the nine places of a scene, from embeddings of name, colour and height."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Embedding(classes, WIDTH) for classes in (*LABELS.values(), HEIGHTS))

    def forward(self, things_B93: Tensor) -> Tensor:
        return torch.stack([part(things_B93[..., n].long()) for n, part in enumerate(self.parts)]).sum(dim=0)


class Batches:
    """Training batches in a random order of their own: pictures, eight questions of each, and some patches."""

    def __init__(self, data: StudyData, batch_size: int, seed: int):
        self.split, self.batch_size = data.splits["train"], batch_size
        self.first_B, self.rng = self.split.first_question_B, torch.Generator().manual_seed(seed)
        self.asked = int(self.first_B[1])
        self.order: list[int] = []

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Numbers of pictures B, words (B, Q, W), answers (B, Q), points (B or 1, P, 2) and their labels (B, P, 2)."""
        while len(self.order) < self.batch_size:
            self.order += torch.randperm(len(self.split.labels_BN2), generator=self.rng).tolist()
        pictures = torch.tensor([self.order.pop() for _ in range(self.batch_size)])
        chosen_BQ = torch.rand(self.batch_size, self.asked, generator=self.rng).argsort(dim=1)[:, :QUESTIONS]
        question_BQ = self.first_B[pictures, None] + chosen_BQ
        patches = torch.randperm(self.split.points_BN2.shape[1], generator=self.rng)[:PROBES]
        labels = self.split.labels_BN2[pictures][:, patches].long()
        words, answers = self.split.words_QW[question_BQ], self.split.answer_Q[question_BQ]
        return pictures, words, answers, self.split.points_of(pictures)[:, patches], labels


def reading_loss(
    reader: Reader, y_BMD: Tensor, words: Tensor, answers: Tensor, points_BP2: Tensor, labels: Tensor
) -> Tensor:
    """Cross-entropy of the answers, and of name and colour of the patches."""
    answering = F.cross_entropy(reader(y_BMD, words).flatten(0, 1), answers.flatten())
    return answering + patch_loss(reader.probe(y_BMD, points_BP2), labels)


def make_reader(data: StudyData) -> Reader:
    """A reader for the data's words and answers."""
    return Reader(len(data.words), len(data.answers))


def pretrained_reader(data: StudyData, steps: int) -> Reader:
    """The pretrained reader; made on first use, beside the data."""
    path, reader = data.folder / READER, make_reader(data)
    if not path.exists():
        save_whole(learn_descriptions(data, steps), path)
    reader.load_state_dict(load_file(path))
    return reader


def learn_descriptions(data: StudyData, steps: int) -> Reader:
    """Trains a reader on descriptions of scenes: one token for each place, with the thing's position."""
    torch.manual_seed(0)
    reader, description = make_reader(data), Description()
    told = load_file(data.folder / "train.safetensors")
    optimiser, batches = Optimiser([reader, description], 1.5e-3, steps), Batches(data, BATCH // 2, seed=0)
    for step in range(steps):
        pictures, *asked = batches.next()
        y_BMD = reader.place(description(told["things"][pictures]), told["centres"][pictures])
        optimiser.step(reading_loss(reader, y_BMD, *asked))
        if (step + 1) % 500 == 0:
            print(f"  reader: step {step + 1} of {steps}", flush=True)
    return reader
