"""Systems that are specified but not built yet, with what they will be made of."""

from __future__ import annotations

from moekit.systems.system import System


def _planned(name: str, title: str, arxiv: str, parts: str) -> System:
    return System(name=name, title=title, paper=f"arXiv {arxiv}", parts=parts)


PLANNED = (
    _planned(
        "time_shift_sampler",
        "Time-Shift Sampler: matches each sample of a diffusion chain to its noise level",
        "2305.15583",
        "a diffusers scheduler",
    ),
    _planned(
        "chartmoe",
        "ChartMoE: connector experts that start from different alignment tasks",
        "2409.03277",
        "a bank of another output width, initialised from projectors",
    ),
    _planned(
        "advmoe",
        "AdvMoE: adversarial training that alternates routers and experts",
        "2308.10110",
        "routing of images, an alternating training procedure",
    ),
    _planned(
        "moe_tinymed",
        "MoE-TinyMed: a small medical vision-language model made sparse",
        "2404.10237",
        "upcycling, a frozen modality router, a shared expert",
    ),
    _planned(
        "switch_dit",
        "Switch-DiT: experts of a diffusion transformer gated by the time step",
        "2403.09176",
        "routing at the scope of the sample by a condition embedding",
    ),
    _planned(
        "moirai_moe",
        "Moirai-MoE: forecasting with experts gated by frozen centroids",
        "2410.10469",
        "a centroid router, a forecasting model",
    ),
    _planned(
        "fsmoe",
        "FSMoE: schedules expert-parallel training from a profile",
        "2501.10714",
        "an expert-parallel dispatch and its schedule",
    ),
    _planned(
        "hydra",
        "Hydra: state-space backbone, sparse attention, chunk-routed experts, memories",
        "2508.15099",
        "routing at the scope of the chunk, one-row experts",
    ),
    _planned(
        "expertflow",
        "ExpertFlow: predicts the experts of every layer before an offloaded model runs",
        "2410.17954",
        "an expert store, a cache, a predictor",
    ),
    _planned(
        "mome",
        "MoME: Matryoshka experts shared across scales for audio-visual speech",
        "2510.04136",
        "one router and bank shared by several scales",
    ),
    _planned(
        "moiie",
        "MoIIE: intra- and inter-modality experts",
        "2508.09779",
        "routers over overlapping sets of one bank, chosen by modality",
    ),
    _planned(
        "time_moe",
        "Time-MoE: point-token forecasting with several horizons",
        "2409.16040",
        "TopK over SwiGLU with a gated shared expert, a forecasting model",
    ),
    _planned(
        "mora",
        "MoRA: rank-1 LoRA experts that route themselves",
        "2506.21035",
        "a router that looks at the experts' own activations",
    ),
    _planned(
        "onerec",
        "OneRec: generates sessions of items, aligned by preference",
        "2502.18965",
        "an encoder-decoder of MoE layers, preference training",
    ),
    _planned(
        "llava_mod",
        "LLaVA-MoD: distils a small sparse vision-language model",
        "2408.15881",
        "upcycling, mimic and preference distillation",
    ),
    _planned(
        "mocha",
        "MoCHA: four vision encoders, sparse connectors, grouped attention",
        "2507.22805",
        "connector banks, one an encoder",
    ),
    _planned(
        "efficientllm",
        "EfficientLLM: six efficiency metrics",
        "2505.13840",
        "measurements of memory, compute, latency, throughput, energy and compression",
    ),
    _planned(
        "uni_moe",
        "Uni-MoE: experts grown on single modalities, then unified",
        "2405.11273",
        "progressive training, LoRA",
    ),
    _planned(
        "fate",
        "Fate: the next layer's gate on this layer's input tells what to prefetch",
        "2502.12224",
        "an expert store, cross-layer prefetch",
    ),
    _planned(
        "topk_gaussian_moe",
        "Top-k softmax gating: estimators and rates",
        "2309.13850",
        "Gaussian estimators",
    ),
    _planned(
        "mixer_dsr",
        "MixER: context-routed experts for families of dynamical systems",
        "2502.05335",
        "routing at the scope of the environment, k-means centroids",
    ),
)
