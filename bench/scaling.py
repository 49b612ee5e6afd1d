"""What IDMM takes as instances grow, by arithmetic alone: `docs/scaling.md` is what this prints.

python -m fastidmm.bench.scaling > docs/scaling.md
"""

from dataclasses import dataclass

from fastidmm.loaders.memory import SHARE
from fastidmm.sharded import MANY

INSTANCES = (2_040, 10_000, 100_000, 1_281_167, 10**7, 10**8, 10**9)
RANKS = (1, 2, 8, 64)
IMAGES, VIEWS, WIDTH = 256, 6, 192  # of the paper's step; of DeiT-Tiny's features
CROPS = IMAGES * VIEWS
PARAMETERS = 5_496_192  # DeiT-Tiny at 112 px, without a head
CROP_FLOP = 1.8e9  # of it at 112 px, forward and backward
PICTURE = 500 * 375 * 3  # bytes of a decoded photograph
GPU_MEMORY, HOST_MEMORY = 141e9, 1e12  # of an H200 and of its host, bytes
FLOPS, LINK = 4e14, 2e11  # a second: of bf16 in practice, and bytes between GPUs of one machine
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Step:
    """One step with so many instances, by so many ranks."""

    instances: int
    ranks: int

    @property
    def sharded(self) -> bool:
        """What `method.head = "auto"` takes."""
        return self.ranks > 1 and self.instances > MANY * CROPS

    @property
    def head_flop(self) -> float:
        """A rank's part of the head: three products of crops, instances and features."""
        return 6 * CROPS * self.instances * WIDTH / self.ranks

    @property
    def backbone_flop(self) -> float:
        """A rank's part of the backbone."""
        return CROP_FLOP * CROPS / self.ranks

    @property
    def state(self) -> float:
        """Bytes of the head on a rank: weights, gradient, two moments, in float32."""
        shared = self.ranks if self.sharded else 1
        return 16 * self.instances * (WIDTH + 1) / shared

    @property
    def logits(self) -> float:
        """Bytes of the logits where a pass over rows keeps them, in float32."""
        return 4 * CROPS * self.instances / self.ranks

    @property
    def summed(self) -> float:
        """Bytes a rank sends where gradients of the head are summed, by a ring."""
        return 2 * self._others * 4 * self.instances * (WIDTH + 1)

    @property
    def exchanged(self) -> float:
        """Bytes a rank sends where it is dealt out: features, gradients, words of each crop."""
        features = 3 * self._others * 4 * CROPS * WIDTH
        return features + self._others * 32 * CROPS + (self.ranks - 1) * 16 * CROPS

    @property
    def _others(self) -> float:
        return (self.ranks - 1) / self.ranks

    @property
    def sent(self) -> float:
        """Bytes a rank sends in a step, the backbone's gradients among them."""
        head = self.exchanged if self.sharded else self.summed
        return head + 2 * self._others * 4 * PARAMETERS

    @property
    def fits(self) -> bool:
        """Whether the head's state leaves half of a GPU to all else."""
        return self.state <= GPU_MEMORY / 2

    @property
    def seconds(self) -> float:
        """Of arithmetic and of what is sent, one after the other."""
        return (self.head_flop + self.backbone_flop) / FLOPS + self.sent / LINK


def tier(num: int) -> str:
    """Where the pixels of so many photographs lie, on each rank."""
    size = num * PICTURE
    if size <= SHARE * GPU_MEMORY:
        return "GPU"
    return "host" if size <= SHARE * HOST_MEMORY else "read in every step"


def short(value: float) -> str:
    """Three figures and a prefix."""
    for unit, prefix in UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.3g} "


def table(keys: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    lines = [keys, ["---"] * len(keys), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_instances() -> str:
    """What grows with them, for one GPU."""
    rows = []
    for num in INSTANCES:
        step = Step(num, 1)
        share = step.head_flop / (step.head_flop + step.backbone_flop)
        rows.append(
            [
                f"{num:,}", f"{short(num * PICTURE)}B", tier(num), f"{short(step.state)}B",
                f"{short(step.logits)}B", f"{short(step.head_flop)}FLOP", f"{100 * share:.1f} %",
                f"{-(-num // IMAGES):,}",
            ]
        )  # fmt: skip
    keys = ["instances", "pixels", "they lie in", "head", "logits", "head's work", "of all"]
    return table([*keys, "steps an epoch"], rows)


def by_ranks() -> str:
    """Who holds and sends what."""
    rows = []
    for num in INSTANCES:
        for ranks in RANKS[1:]:
            step = Step(num, ranks)
            rows.append(
                [
                    f"{num:,}", str(ranks), "sharded" if step.sharded else "replicated",
                    f"{short(step.state)}B" + ("" if step.fits else ", too much"),
                    f"{short(step.summed)}B", f"{short(step.exchanged)}B",
                    f"{1e3 * step.seconds:,.2f} ms", f"{Step(num, 1).seconds / step.seconds:.2g}",
                ]
            )  # fmt: skip
    return table(
        ["instances", "ranks", "head", "of it on a rank", "sent if replicated", "if sharded",
         "a step", "times one GPU"],
        rows,
    )  # fmt: skip


def page() -> str:
    """All of `docs/scaling.md`."""
    equal = round(CROP_FLOP / (6 * WIDTH), -4)
    most = {n: round(n * GPU_MEMORY / 2 / (16 * (WIDTH + 1)), -7) for n in (1, 8, 64)}
    count, crops, images = f"{INSTANCES[0]:,}", f"{CROPS:,}", IMAGES // 8
    many, gradients = f"{MANY * CROPS:,}", short(4 * PARAMETERS)
    last, steps = f"{INSTANCES[-1]:,}", f"{INSTANCES[-1] // IMAGES:,}"
    speeds = f"{short(FLOPS)}FLOP/s in practice, {short(LINK)}B/s between any two GPUs"
    memories = f"{short(GPU_MEMORY)}B on each, {short(HOST_MEMORY)}B on each host"
    return f"""# Scale, on paper

Computed by `python -m fastidmm.bench.scaling`, which prints this page; nothing here is measured.
A step is the paper's: {IMAGES} images, {crops} crops at 112 px, DeiT-Tiny with {PARAMETERS:,}
parameters and {WIDTH} features. Assumed: {speeds}, {memories}, photographs of
500 x 375 px. Launches, latencies and rendering are left out: the times are bounds.

## What grows with the instances, on one GPU

{by_instances()}

"Head" is its weights, gradient and moments. Logits are what a pass by rows keeps; the streaming
kernel keeps none. Photographs that are read in every step are for `dali`, `ffcv` or `torch`.

## Several ranks

{by_ranks()}

`method.head = "auto"` deals the head out where there are more than {many} instances, {MANY} times
the crops. Both ways also sum the backbone's gradients, {gradients}B, which is in the milliseconds.
Nothing overlaps, as in the code. Machines that are joined by a tenth of that speed send the same
bytes in ten times the time.

## Where it stops paying

- **Time**: the head does as much work as the backbone at {equal:,.0f} instances. Beyond, a step
  costs in proportion to the instances, and a method without such a head learns from more crops in
  the same time.
- **Memory**: with half of each GPU for the head, one holds {most[1]:,.0f} instances, 8 hold
  {most[8]:,.0f}, 64 hold {most[64]:,.0f}. A checkpoint has the whole head, three quarters of that
  state, which passes through the memory of the first rank's host; the first weights are made whole
  on every rank.
- **Use**: a row is pulled towards its own image once an epoch. At {last} instances that
  is once in {steps} steps; at {count}, once in {-(-INSTANCES[0] // IMAGES)}.
- **Ranks**: of a step's {IMAGES} images 8 ranks make {images} each, {images * VIEWS} crops: too few
  to keep such a GPU busy. More ranks want a larger `--batch-size`, and a rate to match.
"""


if __name__ == "__main__":
    print(page(), end="")
