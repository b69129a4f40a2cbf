"""The verbs of `diffbench --help`: the purpose of each, where its keys are declared, two examples."""

from dataclasses import dataclass, field

RUN = "config/kinds.py:RunConfig"
SAMPLE, EVALUATE = "config/sections.py:SampleConfig", "config/sections.py:EvaluateConfig"


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        text: what it does, in a line.
        examples: two sets of words that follow `diffbench VERB`.
        keys: dataclasses of its keys -> the prefix of their names; see `config.keys.read_keys`.
        more: further keys, or a word on them.
        module: its module in commands/, where that has another name.
        json: whether it takes --json.
    """

    text: str
    examples: tuple[str, str]
    keys: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    module: str = ""
    json: bool = False


_KINDS = "The keys of a classifier or an autoencoder: `diffbench show CONFIG`."
_SLURM = "launcher=slurm and launcher.KEY=VALUE hand the command to SLURM."
_THE_RUNS = "Keys that are not given keep the values of the run's own config."
VERBS = {
    "init": Verb("copy the shipped experiments into a folder, to begin from", ("", "my-project")),
    "train": Verb(
        "train an experiment; the same command resumes it",
        ("experiments/digits/dit.yaml", "experiments/digits/diffit.yaml seed=1 optimizer.lr=1e-3"),
        {RUN: ""},
        (
            "restart=true sets an earlier run of that name aside and begins anew.",
            "evaluate=null trains without scoring at the end.",
            _KINDS,
            _SLURM,
        ),
    ),
    "encode": Verb(
        "encode an experiment's data into latents ahead of training",
        ("experiments/digits-latent/dit.yaml", "experiments/digits-latent/dit.yaml latent_dtype=float32"),
        {RUN: ""},
        (_SLURM,),
    ),
    "show": Verb(
        "print an experiment's resolved config, and where each value comes from; runs nothing",
        ("experiments/digits/dit.yaml", "experiments/digits/dit.yaml denoiser.depth=2"),
        {RUN: ""},
        (_KINDS,),
    ),
    "list": Verb(
        "list backbones, presets and experiments; or the runs in folders",
        ("", "runs --json"),
        json=True,
    ),
    "evaluate": Verb(
        "score samples of a run, or anyone's images",
        ("runs/digits/dit-s0 sample.steps=50", "samples.npz --against runs/digits/dit-s0"),
        {EVALUATE: "evaluate.", SAMPLE: "sample."},
        (
            "seed=0 draws the samples, ema=0.999 takes that average, snapshot=best the weights of the least distance in"
            " training, and export=FILE.npz writes the samples.",
            f"With --against only evaluate.KEY. {_THE_RUNS}",
        ),
        json=True,
    ),
    "reference": Verb(
        "make statistics of real images",
        ("images/ out=stats.safetensors", "runs/digits/dit-s0 evaluate.count=1000"),
        {EVALUATE: "evaluate."},
        ("out=FILE.safetensors or, for the ADM evaluator, FILE.npz also writes them there.",),
    ),
    "sample": Verb(
        "draw samples of a run into a PNG",
        ("runs/digits/dit-s0 labels=3 n=16 guidance=2", "runs/digits/dit-s0 out=digits.png strip=true gif=true"),
        {"commands/sample.py:DrawConfig": "", SAMPLE: ""},
        (_THE_RUNS,),
    ),
    "study": Verb(
        "train every variant of a study with every seed",
        ("experiments/studies/backbones.yaml", "experiments/studies/window.yaml --dry-run seeds=[0,1] jobs=2"),
        {"studies/config.py:StudyConfig": ""},
        ("--dry-run prints the plan alone.", _SLURM),
    ),
    "compare": Verb(
        "a table and a report of several runs, or of a study",
        ("runs/digits/dit-s0 runs/digits/unet-s0", "runs/studies/backbones primary=fd export=table.tex"),
        {"commands/compare.py:CompareConfig": ""},
        json=True,
    ),
    "reproduce": Verb(
        "train cells of a report again from its page alone, and compare every value",
        ("runs/studies/backbones/report.html", "report.html dit/0 out=again"),
        {"commands/reproduce.py:ReproduceConfig": ""},
        (
            "A cell is a variant and a seed, as dit/0; a variant alone is all its seeds, and all is every cell. Without"
            " any, the cells are listed with what they cost. Exit code 1: something differs.",
        ),
    ),
    "findings": Verb(
        "hold published claims against the shipped results, or against studies run here",
        ("", "run=true seeds=[0,1,2,3,4]"),
        {"commands/findings.py:FindingsConfig": ""},
        ("With run=true also a study's KEY=VALUE, as seeds=[0,1,2].",),
    ),
    "curves": Verb(
        "write the reference curves of an experiment from runs that differ in their seed",
        ("runs/digits/dit-s0 runs/digits/dit-s1 runs/digits/dit-s2", "runs/digits/dit-s? out=curves.csv"),
        {"commands/curves.py:CurvesConfig": ""},
    ),
    "attention": Verb(
        "draw where a run's tokens look along sampling",
        ("runs/digits/diffit-s0", "runs/digits/diffit-s0 times=6 layers=[blocks.0]"),
        {"reports/attention.py:AttentionConfig": ""},
    ),
    "explain": Verb(
        "show which other classes a class is made of",
        ("runs/digits/dit-s0 class=8", "runs/digits/dit-s0 class=8 n=2 target=noise out=eight.png"),
        {"evaluation/explain.py:ExplainConfig": ""},
        (
            "class=8 is the class, by name or number; it has no default.",
            f"sample.KEY=VALUE changes how its samples are drawn, by default without guidance. {_THE_RUNS}",
        ),
    ),
    "import": Verb(
        "turn a published checkpoint into a run folder",
        ("dit DiT-XL-2-256x256.pt runs/imported/dit-xl-2", "adm model.pt runs/imported/adm arguments.num_heads=16"),
        more=(
            "arguments.NAME=VALUE is an argument of the reference's constructor, where its size is not a published one;"
            " weights=KEY takes that set of weights instead of the average, ignore=[NAME] leaves names out; any other"
            " key is the config's, as sample.steps=50.",
        ),
        module="import_checkpoint",
    ),
    "completion": Verb(
        "print a script by which bash completes verbs, keys and files (zsh: after bashcompinit)",
        ("> ~/.diffbench-completion.sh", "| grep trainer"),
    ),
}
