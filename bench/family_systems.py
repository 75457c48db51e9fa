"""Which systems make the family, in which tables, and what of them is compared."""

from typing import NamedTuple


class System(NamedTuple):
    """One row of a table."""

    preset: str
    name: str
    """What papers call it."""
    paper: str
    draws: int
    """Draws of z for each image in the importance-weighted NLL (0: it has none)."""
    picture: str
    """The figure of the run that shows it best."""


# fmt: off
AUTOENCODERS = (
    System("autoencoder",        "Autoencoder",                      "Hinton & Salakhutdinov 2006",     0, "reconstructions.png"),  # noqa: E501
    System("wae-mmd",            "WAE-MMD",                          "Tolstikhin et al. 2018",          0, "samples.png"),  # noqa: E501
    System("vae-gaussian-mlp",   "VAE, fixed σ",                     "Kingma & Welling 2014",         100, "samples.png"),  # noqa: E501
    System("vae-gaussian-conv",  "VAE, fixed σ, convolutions",       "Kingma & Welling 2014",         100, "samples.png"),  # noqa: E501
    System("vae-gaussian-pixel", "VAE, σ of each pixel",             "Kingma & Welling 2014, app. C", 100, "samples.png"),  # noqa: E501
    System("sigma-vae",          "σ-VAE, optimal σ",                 "Rybkin et al. 2021",            100, "samples.png"),  # noqa: E501
    System("sigma-vae-learned",  "σ-VAE, learned σ",                 "Rybkin et al. 2021",            100, "samples.png"),  # noqa: E501
)
BERNOULLI = (
    System("vae",                "VAE",                              "Kingma & Welling 2014",        1000, "samples.png"),  # noqa: E501
    System("vae-5-draws",        "VAE, five draws",                  "Burda et al. 2016",            1000, "samples.png"),  # noqa: E501
    System("vae-softplus-2d",    "VAE, two latents",                 "Kingma & Welling 2014, fig. 4", 500, "manifold.png"),  # noqa: E501
    System("cvae",               "CVAE, p(z)",                       "Sohn et al. 2015",             1000, "classes.png"),  # noqa: E501
    System("cvae-class-prior",   "CVAE, p(z given y)",               "Sohn et al. 2015",             1000, "classes.png"),  # noqa: E501
    System("svi",                "SVI: a table of q, no encoder",    "Hoffman et al. 2013",           500, "reconstructions.png"),  # noqa: E501
    System("semi-amortized",     "Semi-amortised VAE",               "Kim et al. 2018",               500, "reconstructions.png"),  # noqa: E501
)
IMPORTANCE_WEIGHTED = (
    System("iwae-5",             "IWAE, k = 5",                      "Burda et al. 2016",            1000, "samples.png"),  # noqa: E501
    System("iwae-50",            "IWAE, k = 50",                     "Burda et al. 2016",            1000, "samples.png"),  # noqa: E501
    System("iwae-5-dreg",        "IWAE, k = 5, DReG gradient",       "Tucker et al. 2019",           1000, "samples.png"),  # noqa: E501
    System("miwae",              "MIWAE, 2 × 4 draws",               "Rainforth et al. 2018",        1000, "samples.png"),  # noqa: E501
    System("piwae",              "PIWAE, 2 × 4 draws",               "Rainforth et al. 2018",        1000, "samples.png"),  # noqa: E501
    System("ciwae",              "CIWAE, half ELBO, half k = 5",     "Rainforth et al. 2018",        1000, "samples.png"),  # noqa: E501
)
WEIGHTED = (
    System("beta-vae",           "β-VAE",                            "Higgins et al. 2017",           500, "traversals.png"),  # noqa: E501
    System("capacity",           "β-VAE with capacity",              "Burgess et al. 2018",           500, "traversals.png"),  # noqa: E501
    System("free-bits",          "Free bits",                        "Kingma et al. 2016",            500, "latent_plane.png"),  # noqa: E501
    System("kl-warmup",          "KL warm-up",                       "Bowman et al. 2016",            500, "samples.png"),  # noqa: E501
    System("kl-cycles",          "Cyclical KL warm-up",              "Fu et al. 2019",                500, "samples.png"),  # noqa: E501
    System("beta-tcvae",         "β-TCVAE",                          "Chen et al. 2018",              500, "traversals.png"),  # noqa: E501
    System("infovae",            "InfoVAE (MMD-VAE)",                "Zhao et al. 2019",              500, "latent_plane.png"),  # noqa: E501
)
PRIORS = (
    System("mixture-prior",      "VAE, mixture prior",               "Tomczak & Welling 2018 (MoG)", 1000, "samples.png"),  # noqa: E501
    System("vampprior",          "VampPrior",                        "Tomczak & Welling 2018",       1000, "samples.png"),  # noqa: E501
    System("iaf",                "IAF posterior",                    "Kingma et al. 2016",           1000, "samples.png"),  # noqa: E501
)
LIKELIHOODS = (
    System("categorical",        "VAE, categorical pixels",          "van den Oord et al. 2016",      100, "samples.png"),  # noqa: E501
    System("logistic-mixture",   "VAE, discretised logistics",       "Salimans et al. 2017",           20, "samples.png"),  # noqa: E501
)
NETWORKS = (
    System("bnn-classes",        "Bayes by Backprop, classes",       "Blundell et al. 2015",            0, "calibration.png"),  # noqa: E501
    System("bnn-regression",     "Bayes by Backprop, regression",    "Blundell et al. 2015",            0, "predictions.png"),  # noqa: E501
)
PUBLISHED = (
    System("mnist-static-400",   "VAE, 784–400–40, static pixels",   "Kingma & Welling 2014",         200, "samples.png"),  # noqa: E501
)
# fmt: on

BINARY = (
    "All systems here and in the next three tables model the same binary images: MNIST, each held-"
    "out pixel drawn once from its grey value, by noise that is the same for all. Their NLLs "
    "compare with one another"
)
OF_A_VAE = ("system", "settings", "−ELBO", "NLL", "draws", "KL", "active", "probe", "time", "")


class Section(NamedTuple):
    """One table: what is in it, and what in it compares with what."""

    title: str
    text: str
    systems: tuple[System, ...]
    columns: tuple[str, ...] = OF_A_VAE


SECTIONS = (
    Section(
        "Autoencoder and Gaussian decoders",
        "The likelihood is a density of grey MNIST pixels on [0, 1], so it may exceed 1 and an NLL "
        "may be negative. NLLs compare within this table only. The first two have a deterministic "
        "posterior, hence no bound and no likelihood: of them only the reconstructions compare.",
        AUTOENCODERS,
        (*OF_A_VAE[:-2], "PSNR", *OF_A_VAE[-2:]),
    ),
    Section(
        "Bernoulli VAE, conditional, inference",
        f"{BINARY}, but for the two conditional ones: theirs is −log p(x given y), which the label "
        "alone lowers by the information that it has of the image, at most log 10 = 2.3 nats. A "
        "table's row moves only when its image is met, once an epoch, so SVI has far to go after "
        "as many epochs as the encoders had.",
        BERNOULLI,
    ),
    Section(
        "Importance-weighted",
        "Trained on other bounds, measured alike: the −ELBO is the bound of a single draw whatever "
        "was trained, and may be worse where that was another bound.",
        IMPORTANCE_WEIGHTED,
    ),
    Section(
        "β and relatives",
        "The −ELBO is unweighted, whatever the objective weighs. These objectives give likelihood "
        "away for other ends: fewer nats of KL, latents in use, independent latents.",
        WEIGHTED,
    ),
    Section("Priors and posteriors", "Compare with the VAE above.", PRIORS),
    Section(
        "Other likelihoods",
        "Probabilities of integer pixels. The first is of MNIST cut to 16 levels, the second of "
        "CIFAR-10 with its 256: neither compares with anything else on this page.",
        LIKELIHOODS,
        (*OF_A_VAE[:4], "bits/dim", *OF_A_VAE[4:]),
    ),
    Section(
        "Bayesian networks",
        "Networks with random weights that predict labels: the classes of MNIST's images, and the "
        "targets of the diabetes table in their unit. Scores are those of predictions averaged "
        "over draws of the weights, on held-out rows; log p(y given x) in nats per row.",
        NETWORKS,
        ("system", "settings", "log p(y given x)", "right", "calibration error", "time", ""),
    ),
)
PUBLISHED_NLL = 89.8
STATIC = Section(
    "The setting of a published number",
    "A VAE of 784–400–40 ReLU units on MNIST binarised once, batch 100, Adam from 1e-4, 500 "
    f"epochs: pythae's reproduction has an importance-weighted NLL of {PUBLISHED_NLL} nats with "
    "200 draws. That is what NLL below compares with; the curve in the chart is the −ELBO, a "
    "looser bound. Not the same: the published images are one fixed binarisation (Larochelle & "
    "Murray 2011), ours are drawn from the grey pixels by the run's seed; theirs trains on "
    "50,000 images and keeps the weights that were best on 10,000 more, ours trains on all "
    "60,000 and keeps the last; their rate falls by 10^(−1/5) after epochs 200 and 350, ours "
    "after 175 and 350.",
    PUBLISHED,
)
SYSTEMS = tuple(system for section in (*SECTIONS, STATIC) for system in section.systems)

# Better than which other, in importance-weighted NLL?
COMPARISONS = (
    ("iwae-5", "vae"),
    ("iwae-50", "vae"),
    ("cvae", "vae"),
    ("cvae-class-prior", "cvae"),
    ("vampprior", "vae"),
    ("iaf", "vae"),
    ("mixture-prior", "vae"),
)

BASE = "vae"
