"""Estimators on architectures that people use, made from configurations: right, or refused.

`make test-architectures` installs the packages and runs it; without them, it is skipped.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pyro_bayes import BayesianModel

CONTEXTS = 300


def transformers_models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
        "max_position_embeddings": 32,
    }
    gpt = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    tokens = torch.randint(1, 40, (4, 6))
    images = torch.randn(4, 3, 16, 16)
    vision = {**small, "image_size": 16, "patch_size": 8}
    t = transformers
    models = {
        "BERT": (t.BertForSequenceClassification, t.BertConfig(**small), {"input_ids": tokens}),
        "GPT-2": (t.GPT2LMHeadModel, t.GPT2Config(**gpt), {"input_ids": tokens}),
        "Llama": (
            t.LlamaForCausalLM,
            t.LlamaConfig(**small, num_key_value_heads=1),
            {"input_ids": tokens},
        ),
        "DistilBERT": (
            t.DistilBertForSequenceClassification,
            t.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40),
            {"input_ids": tokens},
        ),
        "RoBERTa": (
            t.RobertaForSequenceClassification,
            t.RobertaConfig(**small, pad_token_id=0),
            {"input_ids": tokens},
        ),
        "Mixtral": (
            t.MixtralForCausalLM,
            t.MixtralConfig(**small, num_key_value_heads=1, num_local_experts=2),
            {"input_ids": tokens},
        ),
        "ViT": (t.ViTForImageClassification, t.ViTConfig(**vision), {"pixel_values": images}),
        "Swin": (
            t.SwinForImageClassification,
            t.SwinConfig(
                image_size=16,
                patch_size=2,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[1, 2],
                window_size=4,
            ),
            {"pixel_values": images},
        ),
        "ConvNeXt": (
            t.ConvNextForImageClassification,
            t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
            {"pixel_values": images},
        ),
        "Mamba": (
            t.MambaForCausalLM,
            t.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4),
            {"input_ids": tokens},
        ),
    }
    return {
        name: (lambda m=make, c=config: m(c), inputs, lambda o: o.logits)
        for name, (make, config, inputs) in models.items()
    }


def timm_models() -> dict[str, Any]:
    timm = pytest.importorskip("timm")
    names = {
        "resnet10t": 32,
        "convnext_atto": 32,
        "mobilenetv3_small_050": 32,
        "levit_128s": 224,
        "vit_tiny_patch16_224": 32,
        "efficientformer_l1": 224,
        "beit_base_patch16_224": 32,
    }
    options: dict[str, Any] = {
        "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 2},
        "beit_base_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3},
        "levit_128s": {"embed_dim": (16, 16, 16), "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
        "efficientformer_l1": {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8)},
    }
    from timm.models.mlp_mixer import MlpMixer

    mixer = {"img_size": 32, "patch_size": 8, "num_blocks": 1, "embed_dim": 16, "num_classes": 3}
    models = {"mixer": (lambda: MlpMixer(**mixer), {"x": torch.randn(2, 3, 32, 32)}, lambda o: o)}
    return models | {
        name: (
            lambda n=name: timm.create_model(n, num_classes=3, **options.get(n, {})),
            {"x": torch.randn(2, 3, size, size)},
            lambda o: o,
        )
        for name, size in names.items()
    }


def graph_models() -> dict[str, Any]:
    geometric = pytest.importorskip("torch_geometric.nn")
    x, edges = torch.randn(8, 4), torch.randint(0, 8, (2, 24))
    models = {
        "GCN": lambda: geometric.GCN(4, 8, 2, 3),
        "GAT": lambda: geometric.GAT(4, 8, 2, 3),
        "GIN": lambda: geometric.GIN(4, 8, 2, 3),
        "GraphSAGE": lambda: geometric.GraphSAGE(4, 8, 2, 3),
    }
    inputs = {"x": x, "edge_index": edges}
    return {name: (make, inputs, lambda o: o) for name, make in models.items()}


def peft_models() -> dict[str, Any]:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)

    def adapted(kind: Any) -> nn.Module:
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), kind)
        for parameter in model.parameters():
            if parameter.requires_grad:  # zeros would hide what they are multiplied with
                nn.init.normal_(parameter, std=0.2)
        return model

    kinds = {
        "LoRA": peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        "DoRA": peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
        "IA3": peft.IA3Config(
            target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True
        ),
    }
    inputs = {"input_ids": torch.randint(1, 40, (4, 6))}
    return {
        name: (lambda k=kind: adapted(k), inputs, lambda o: o.logits)
        for name, kind in kinds.items()
    }


def flows() -> dict[str, Any]:
    zuko = pytest.importorskip("zuko")
    x, c = torch.randn(4, 2), torch.randn(4, 3)
    options: dict[str, Any] = {"transforms": 2, "hidden_features": (16,)}
    kinds = {
        **dict.fromkeys(("NICE", "MAF", "NSF", "SOSPF", "BPF", "GF", "NCSF"), options),
        "NAF": {**options, "transforms": 1, "signal": 4, "network": {"hidden_features": (8,)}},
        "UNAF": {**options, "transforms": 1, "signal": 4, "network": {"hidden_features": (8,)}},
        "CNF": {"hidden_features": (8,)},
    }
    return {
        f"zuko {name}": (
            lambda n=name, o=kinds[name]: getattr(zuko.flows, n)(2, 3, **o),
            {"c": c},
            lambda flow: flow.log_prob(x.sigmoid()),
        )
        for name in kinds
    }


GROUPS = {
    "transformers": (transformers_models, 10),
    "timm": (timm_models, 8),
    "torch_geometric": (graph_models, 4),
    "peft": (peft_models, 3),
    "zuko": (flows, 10),
}


@pytest.mark.parametrize(
    ("group", "number"), [(g, i) for g, (_, count) in GROUPS.items() for i in range(count)]
)
def test_estimators_are_right_or_refused(group: str, number: int) -> None:
    torch.manual_seed(0)
    models = GROUPS[group][0]()
    assert len(models) == GROUPS[group][1]
    name, (make, inputs, outputs) = list(models.items())[number]
    base = make().eval()
    for parameter in base.parameters():
        if parameter.dim() > 1 and parameter.requires_grad:
            parameter.data.mul_(3.0)  # so that positions and examples differ
    included = [n for n, p in base.named_parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnn = BayesianModel(base, init_logvar=-7.0, include_params=included)
        found = bnn.check(
            num_contexts=CONTEXTS,
            function=lambda net, **kwargs: outputs(net(**copy.copy(kwargs))),
            **inputs,
        )
    print(f"\n{name}\n{found}")
    for row in found.rows:
        refused = row.remark is not None
        assert row.agrees or refused or row.estimator == "local noise", f"{name}: {found}"
