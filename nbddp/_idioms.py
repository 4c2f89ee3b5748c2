"""How Python is written in notebooks: which calls set, seed, draw, change or show something, by their names.

This is the guessing part of `nbddp._effects`. A name that is missing here costs a statement too many in an exported
script, or, of what changes or draws, one too few.
"""

from __future__ import annotations

import re
import sys


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What no name of Python's can be.
SETTINGS = "<settings>"
GENERATORS = ("<random torch>", "<random numpy>", "<random python>")
SEEDS = {generator: f"<seed of {generator}>" for generator in GENERATORS}

# Whose settings are the whole process's, whether or not the cell uses the module itself.
OF_THE_PROCESS = sys.stdlib_module_names | {"torch", "numpy", "lightning", "pytorch_lightning", "transformers"}

SETTING = re.compile(
    r"(set|use|enable|disable|register|filterwarnings|simplefilter|basicConfig|config|update|setdefault|chdir|putenv|umask"
    r"|append|insert|extend|captureWarnings|setLevel|addHandler|setrecursionlimit|init|seed|manual_seed)(_\w+)?$"
)
SEEDING = re.compile(r"(manual_seed(_all)?|seed(_everything|_all)?|(set|fix)_(random_|all_)?seeds?)$")

# Functions of these show or write their arguments, and leave them as they are.
SHOW = frozenset({"matplotlib", "seaborn", "plotly", "logging", "pprint", "IPython", "tqdm", "time", "sys", "warnings"})
# Functions of these make new values of their arguments, but for those that `CHANGING` names.
COMPUTE = sys.stdlib_module_names | _words("torch numpy pandas scipy sklearn PIL torchvision torchaudio")

CHANGING = re.compile(
    r"(shuffle|heapify|heappush|heappop|heapreplace|insort(_left|_right)?|copyto|put|place|putmask|fill_diagonal|setattr"
    r"|delattr|next|update_bn|vector_to_parameters|.*[^_]_|(re)?train(_\w+)?|fit(_\w+)?|finetune(_\w+)?|step(_\w+)?"
    r"|update(_\w+)?|init(_\w+)?|freeze(_\w+)?|unfreeze(_\w+)?|load_\w*state\w*|set_\w+|add_\w+|register_\w+|apply)$"
)
# Methods that change what they are called on, whatever becomes of their value.
CHANGING_METHODS = re.compile(
    r"(pop|popitem|popleft|setdefault|step|fit(_\w+)?|partial_fit|train|eval|apply|read|readline|readlines|send|add_\w+"
    r"|register_\w+|load_state_dict|share_memory|[a-z]\w*[^_]_)$"
)
# Methods of containers: what is in them stays as it is.
CONTAINERS = _words("""
    append extend insert remove clear update add discard sort reverse pop popitem appendleft extendleft popleft rotate
    setdefault put write
""")
# Methods whose value is shown, or that show something.
SHOWING_METHODS = _words("""
    head tail describe info sample show plot hist savefig imshow scatter bar boxplot mean sum min max std var item
    tolist numpy size numel dim keys values items get count index format join split value_counts unique nunique
    isna isnull parameters named_parameters state_dict children modules copy clone detach cpu argmax round
    to_string summary print dtypes corr groupby norm abs t any all save to_csv to_json to_parquet save_pretrained
    close flush tight_layout legend set_title set_xlabel set_ylabel set_xlim set_ylim grid display forward
""")

TORCH_DRAWS = re.compile(
    r"(rand(n|int|perm)?(_like)?|randint_like|normal|bernoulli|multinomial|poisson|random_split|dropout\w*)$"
)
LAYERS = re.compile(r"(Linear|Conv|Embedding|RNN|LSTM|GRU|Transformer|MultiheadAttention)")
METHOD_DRAWS = re.compile(
    r"(rsample|sample_n|normal_|uniform_|random_|bernoulli_|exponential_|geometric_|cauchy_|log_normal_|multinomial)$"
)
SKLEARN_DRAWS = re.compile(r"(train_test_split|shuffle|resample|make_\w+)$")
MAKES_GENERATOR = re.compile(r"(default_rng|Generator|RandomState|Random|SeedSequence)$")
OWN_RANDOMNESS = frozenset({"generator", "random_state", "rng", "seed"})
CLASS = re.compile(r"_*[A-Z]\w*[a-z]\w*$|_*[A-Z]+$")

# Functions of Python's own whose value is made of their arguments, or is one of them.
KEEP = _words("list tuple dict set iter next zip map filter reversed enumerate sorted max min getattr")
# ... whose value holds nothing of them, and is neither a number nor a string.
FRESH = _words(
    "sum abs any all type isinstance issubclass repr print format divmod pow input ord chr bin hex hasattr callable"
)
# ... that do not go through them.
LOOK = _words(
    "len print isinstance issubclass type id hasattr getattr setattr delattr repr str bool callable vars dir super"
)
# Functions of libraries that compute whose value holds their arguments nevertheless.
KEEP_OF_LIBRARIES = _words("from_numpy as_tensor asarray compile partial chain cycle islice copy")
# Functions and classes of libraries whose value is what its parts are, for what a call of it does.
CONTAINER_OF = re.compile(
    r"(Sequential|Module(List|Dict)|(Distributed)?DataParallel|FullyShardedDataParallel|AveragedModel|compile|(deep)?copy"
    r"|chain|cycle|islice|tqdm|trange|track|Subset|spectral_norm|weight_norm|prepare)$"
)
# Methods that return their own object.
RETURN_THEMSELVES = _words("""
    to cuda cpu train eval float double half bfloat16 requires_grad_ manual_seed share_memory apply compile
""")
# Methods whose value holds nothing of their object.
FRESH_METHODS = _words("""
    item tolist mean sum std var numel size dim count index clone format join split argmax
""")
# Methods of objects of any library that only look, or make something new.
PURE_METHODS = re.compile(r"(get|is|has|to|as|num|predict|encode|decode|tokenize|transform|score)(_\w+)?$|__\w+__$")
# Methods of containers that change them whatever becomes of their value: that is None, or what was in them.
ALWAYS_CHANGING = _words("""
    append extend insert remove clear discard appendleft extendleft pop popitem popleft rotate setdefault update write
""")

# Functions whose value nothing can change.
CONSTANTS = frozenset(
    {"int", "float", "str", "bool", "len", "bytes", "range", "frozenset", "round", "hash", "id"}
    | {"torch.device", "pathlib.Path"}
)

# Libraries whose functions leave their arguments as they are if their value is used.
MAKE = _words("""
    einops torchmetrics datasets tokenizers transformers huggingface_hub safetensors timm evaluate tiktoken yaml
    requests polars pyarrow h5py cv2 skimage imageio nltk spacy omegaconf psutil accelerate
""")

# A call of an object that one of these has made leaves it as it is, but for those that keep something of each call.
_CALLED = re.compile(r"(torch\.(nn|distributions)|torchvision\.(transforms|ops)|torchaudio\.transforms|sklearn)\.")
_TOKENIZERS = re.compile(
    r"transformers\.(models\.)?\w*(Tokenizer|Processor|FeatureExtractor)(Fast)?(\.from_pretrained)?$"
)
_COUNTING = re.compile(r"Lazy|BatchNorm|InstanceNorm|spectral_norm|SpectralNorm|AveragedModel|Observer|Quant|Fake")
# Its draws, while it trains.
CALL_DRAWS = re.compile(
    r"Dropout|RReLU|torch\.nn\.(Transformer|MultiheadAttention)|torchvision\.(models|transforms)|timm|transformers\.\w*Model"
)

# What torch's own generator is called.
DEFAULT_GENERATORS = frozenset({"torch.manual_seed", "torch.seed", "torch.default_generator"})


def leaves_all(kind: str) -> bool:
    """Tell whether a call of an object leaves it, and its arguments, as they are, given what has made it."""
    return bool((_CALLED.match(kind) and not _COUNTING.search(kind)) or _TOKENIZERS.match(kind))


def makes_new(kind: str) -> bool:
    """Tell whether a call of an object returns something new, given what has made it."""
    return bool(_CALLED.match(kind) or _TOKENIZERS.match(kind))


def is_loader(kind: str) -> bool:
    """Tell whether going through what this has made draws random numbers."""
    return kind.endswith(("DataLoader", "RandomSampler"))


def is_generator(kind: str) -> bool:
    """Tell whether this has made a generator of random numbers."""
    if kind.endswith("Generator"):
        return True
    return MAKES_GENERATOR.search(kind) is not None and ("random" in kind or kind.startswith("torch."))


def generators_of(callee: str) -> frozenset[str]:
    """Return the generators that a function seeds."""
    if callee.startswith("torch."):
        return frozenset({GENERATORS[0]})
    if callee.startswith("numpy."):
        return frozenset({GENERATORS[1]})
    return frozenset({GENERATORS[2]}) if callee.startswith("random.") else frozenset(GENERATORS)


def drawn_by(callee: str, last: str) -> frozenset[str]:
    """Return the global generators that a function of a library draws from."""
    top = callee.partition(".")[0]
    if top == "torch":
        layers = callee.startswith("torch.nn.") and (LAYERS.search(last) or ".init." in callee)
        drawing = callee.startswith("torch.distributions.") and last in ("sample", "rsample")
        return frozenset({GENERATORS[0]}) if TORCH_DRAWS.match(last) or layers or drawing else frozenset()
    if top in ("torchvision", "timm", "transformers") and last != "from_pretrained":
        return frozenset({GENERATORS[0]}) if "transforms" not in callee and "datasets" not in callee else frozenset()
    if callee.startswith("numpy.random."):
        return frozenset() if MAKES_GENERATOR.match(last) else frozenset({GENERATORS[1]})
    if top == "sklearn" and SKLEARN_DRAWS.match(last):
        return frozenset({GENERATORS[1]})
    if callee.startswith("random.") and not MAKES_GENERATOR.match(last):
        return frozenset({GENERATORS[2]})
    return frozenset()
