"""
Evaluate the tokenizer: how many bytes of text a token stands for, beside GPT-2's and GPT-4's.

Fewer tokens for the same text is less work per sentence and more text in the context. A vocabulary learned from English
prose pays with code, numbers and other scripts.

reads   tokenizer/, base_data/ (the first training shard, the validation shard)
writes  tokenizer/eval.json; references/, the other vocabularies, or that they can't be had: nobody is asked twice
run     python tok_eval.py
        python tok_eval.py --references=             ours alone, nothing is fetched
"""
from plumbing import packages  # noqa: F401, I001: first, so that it can say what is missing
import os
import shlex
import sys
import textwrap
import threading
import time

import tiktoken
from tiktoken_ext import openai_public

from data import VAL_SHARD, read_texts, shard_path
from evals.saved import read_results, write_results
from plumbing.common import base_path
from plumbing.configurator import configure
from tokenizer import load_tokenizer

references = "gpt2,cl100k_base"  # tiktoken's names of the vocabularies to compare with; "" = none
fetch_seconds = 30             # wait so long for a vocabulary that is not on this machine (1 to 2 MB each)
num_chars = 1_000_000          # characters of each shard to encode; 0 = all
resume = 0                     # 1 = keep the results there are of this tokenizer and these settings
config = configure(globals(), show=False)

TITLES = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}
LONGEST_PIECE = 20_000         # characters encoded at once: more white space in a row overflows tiktoken's stack

# Written for this file, about a thousand bytes each, in the manner of what they stand for.
TEXTS = {
    "news": """\
HARBOUR TOWN VOTES TO KEEP ITS NIGHT FERRY

After four hours of debate on Tuesday evening, the town council voted 9 to 6 to keep the night ferry
running until at least the end of next year. The service, which loses about $340,000 annually,
carries some 210 passengers on an ordinary weeknight, most of them nurses, bakers and cleaners who
work on the far side of the bay.

"Nobody in this room takes the 2:15 boat," said councillor Martha Olsen, who had introduced the
motion in March. "The people who do take it were asleep during this meeting, because they have to
get up at one." Opponents pointed to the report of the auditors, according to which a bus around the
bay would cost less than half as much, but would need fifty-five minutes instead of eighteen.

The mayor, who didn't vote, called the result "expensive but decent". Fares are to rise by ten
percent in January.
""",
    "code": '''\
import heapq


class Graph:
    """A directed graph with weights; edges[u] is a list of (v, weight) pairs."""

    def __init__(self):
        self.edges = {}

    def add_edge(self, u, v, weight=1.0):
        if weight < 0:
            raise ValueError(f"negative weight: {weight}")
        self.edges.setdefault(u, []).append((v, weight))
        self.edges.setdefault(v, [])

    def distances(self, source):
        """Length of the shortest path from source to every node that can be reached."""
        best = {source: 0.0}
        queue = [(0.0, source)]
        while queue:
            length, u = heapq.heappop(queue)
            if length > best[u]:
                continue                    # an older, longer entry of the same node
            for v, weight in self.edges[u]:
                if length + weight < best.get(v, float("inf")):
                    best[v] = length + weight
                    heapq.heappush(queue, (best[v], v))
        return best
''',
    "math": r"""\begin{theorem}
For every integer $n \ge 1$ we have $\sum_{k=1}^{n} k^3 = \left( \frac{n(n+1)}{2} \right)^2$.
\end{theorem}

\begin{proof}
We use induction on $n$. For $n = 1$ both sides are equal to $1$. Suppose that the claim holds for some $n$; write
$S_n = \sum_{k=1}^{n} k^3$. Then
\begin{align*}
S_{n+1} &= S_n + (n+1)^3 = \frac{n^2 (n+1)^2}{4} + (n+1)^3 \\
        &= \frac{(n+1)^2 \left( n^2 + 4n + 4 \right)}{4} = \left( \frac{(n+1)(n+2)}{2} \right)^2,
\end{align*}
which is the claim for $n + 1$. \qed
\end{proof}

For example, $1 + 8 + 27 + 64 + 125 = 225 = 15^2$ and, with $n = 100$, the sum is $5050^2 = 25{,}502{,}500$. The mean of
the first $n$ cubes therefore grows like $n^3 / 4$: divided by it, the ratio tends to $1$ as $n \to \infty$.
""",
    "science": """\
When a leaf is moved from shade into full sun, its chloroplasts receive more light than they can
use. Within seconds the pH inside the thylakoids drops below 5.5, a protein called PsbS changes its
shape, and the antenna complexes around photosystem II begin to give off the surplus as heat. This
is known as non-photochemical quenching. Over some minutes the xanthophyll cycle adds to it:
violaxanthin is converted, by way of antheraxanthin, into zeaxanthin, which binds to the antennae
and keeps them in the dissipating state. Protection has a price. If a cloud passes, photosynthesis
stays limited for several minutes, since the relaxation takes longer than the onset; estimates of
the loss of carbon uptake in a crop canopy range from 7 to 30 percent. In field trials with plants
that overexpress the three enzymes concerned, the dry mass was higher by about 15 percent, although
the effect was not found in every species or every year.
""",
    "Korean": """\
어제 저녁에 동생과 함께 동네 시장에 다녀왔다. 비가 그친 뒤라 공기가 맑았고, 가게마다 불이 켜져 있어서 골목이 낮처럼 환했다.
우리는 먼저 두부와 콩나물을 사고, 할머니께서 좋아하시는 참외도 다섯 개 골랐다. 과일 가게 아저씨는 "오늘은 비 때문에 손님이
적었어요." 하시면서 자두를 한 줌 더 넣어 주셨다. 돌아오는 길에는 떡집 앞에서 잠깐 줄을 섰다. 갓 나온 떡에서 김이 모락모락
올라왔고, 동생은 집까지 참지 못하고 하나를 먼저 먹었다. 집에 와서 된장찌개를 끓이고 다 같이 늦은 저녁을 먹었다. 별일 없는
하루였지만, 이상하게 오래 기억에 남을 것 같다.
""",
}


def kept_path(name):
    """Where the vocabulary of that name is kept, or {"missing": why}: the network is asked once."""
    return base_path("references", f"{name}.json")


def load_reference(name):
    """Put tiktoken's encoding of that name into `found`, or a text that says why it is missing."""
    try:
        if kept := read_results(kept_path(name)):
            ranks = {token.encode("latin-1"): rank for token, rank in kept.get("mergeable_ranks", {}).items()}
        else:
            # not tiktoken.get_encoding: its lock would let one that hangs hold up all others
            kept = openai_public.ENCODING_CONSTRUCTORS[name]()
            ranks = kept["mergeable_ranks"]
            text = {token.decode("latin-1"): rank for token, rank in ranks.items()}      # JSON knows no bytes
            write_results(kept_path(name), kept | dict(mergeable_ranks=text))
        found[name] = kept.get("missing") or tiktoken.Encoding(**kept | dict(mergeable_ranks=ranks))
    except Exception as error:             # whatever the network or a broken cache may come up with
        found[name] = f"{type(error).__name__}: {error}".partition("(")[0].rstrip(": ")    # without the whole chain


# the same tokenizer with the same settings was measured already?
wanted = [name.strip() for name in references.split(",") if name.strip()]
if not set(wanted) <= set(openai_public.ENCODING_CONSTRUCTORS):
    raise SystemExit(f"references={references}: tiktoken has {', '.join(openai_public.ENCODING_CONSTRUCTORS)}")
tokenizer = load_tokenizer()
path = base_path("tokenizer", "eval.json")
settings = dict(references=wanted, num_chars=num_chars)
if resume and (old := read_results(path, fingerprint=tokenizer.fingerprint, settings=settings)):
    again = f" (without {', '.join(old['missing'])}; to ask again: rm its file in {base_path('references')}; " \
            "python tok_eval.py)" if old["missing"] else ""
    print(f"tok_eval: finished already, see {path}{again}")
    raise SystemExit(0)

# the texts: five of our own, and what the model is trained and tested on
pieces = {label: [text] for label, text in TEXTS.items()}
for label, shard in (("train", shard_path(0)), ("validation", shard_path(VAL_SHARD))):
    if not os.path.exists(shard):
        print(f"{label} text: left out, there is no {shard}")
        continue
    pieces[label], left = [], num_chars or sys.maxsize
    for text in read_texts(shard):
        text = text[:left]
        left -= len(text)
        pieces[label] += [text[i:i + LONGEST_PIECE] for i in range(0, len(text), LONGEST_PIECE)]
        if not left:
            break

# the references: tiktoken fetches without a time limit, so it does that in threads that are not waited for
found, deadline = {}, time.monotonic() + fetch_seconds
threads = [threading.Thread(target=load_reference, args=[name], daemon=True) for name in wanted]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(max(0.0, deadline - time.monotonic()))
loaded = {TITLES.get(name, name): found.get(name, f"no answer within {fetch_seconds} seconds") for name in wanted}
missing = {title: why for title, why in loaded.items() if isinstance(why, str)}
theirs = {title: encoding for title, encoding in loaded.items() if title not in missing}
encoders = {"ours": tokenizer.encode, **{title: encoding.encode_ordinary for title, encoding in theirs.items()}}
texts = {label: dict(bytes=sum(len(piece.encode("utf-8", "replace")) for piece in some),
                     tokens={name: sum(len(encode(piece)) for piece in some) for name, encode in encoders.items()})
         for label, some in pieces.items() if some}

# the table: bytes per token of each tokenizer, and what the others need for one token of ours
vocab_sizes = {"ours": tokenizer.vocab_size, **{title: encoding.n_vocab for title, encoding in theirs.items()}}
print("bytes per token; the vocabularies: " + ", ".join(f"{name} {size:,}" for name, size in vocab_sizes.items()))
titles = [*encoders, *(f"{title}/ours" for title in theirs)]
print(f"{'text':12}{'bytes':>10}" + "".join(f"{title:>12}" for title in titles))
for label, text in texts.items():
    counts = text["tokens"]
    numbers = [text["bytes"] / n for n in counts.values()] + [counts[title] / counts["ours"] for title in theirs]
    print(f"{label:12}{text['bytes']:>10,}" + "".join(f"{number:12.3f}" for number in numbers))
for name in wanted:
    if why := missing.get(title := TITLES.get(name, name)):
        write_results(kept_path(name), dict(missing=why))
        print(f"{title}: not compared, tiktoken has not got its vocabulary here ({textwrap.shorten(why, 80)}); "
              f"to ask again: rm {shlex.quote(kept_path(name))}; python tok_eval.py")
write_results(path, dict(fingerprint=tokenizer.fingerprint, settings=settings, vocab_sizes=vocab_sizes, texts=texts,
                         missing=missing))
print(f"tok_eval: written to {path}")
