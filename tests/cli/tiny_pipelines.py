"""Tiny pipelines of diffusers with random weights, in folders as `save_pretrained` writes them."""

import torch


def _t5(width):
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    vocabulary += [(f"▁{c}", -3.0) for c in letters] + [(c, -4.0) for c in f"{letters}▁,.!"]
    sizes = dict(d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config = T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **sizes)
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0), T5EncoderModel(config).eval()


def _clip(width):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,.!"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=numbered, merges=[], model_max_length=77)
    sizes = dict(hidden_size=width, intermediate_size=32, projection_dim=width)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokens))
    ends = dict(bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1)
    return tokenizer, CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **ends)).eval()


def _vae(**options):
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2)
    blocks |= dict(up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8))
    return AutoencoderKL(**blocks, layers_per_block=1, norm_num_groups=4, **options).eval()


def save_pixart(folder):
    """Write a PixArtAlphaPipeline, for latents of 8 x 8 and images of 16 x 16."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    tokenizer, encoder = _t5(12)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        use_additional_conditions=False,
    )
    parts = tokenizer, encoder, _vae(latent_channels=4), transformer, DPMSolverMultistepScheduler()
    PixArtAlphaPipeline(*parts).save_pretrained(folder)


def save_sd3(folder):
    """Write a StableDiffusion3Pipeline, for latents of 8 x 8 and images of 16 x 16."""
    import diffusers

    torch.manual_seed(0)
    first, second, (tokenizer, encoder) = _clip(8), _clip(8), _t5(20)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=12,
    )
    diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        _vae(latent_channels=4, shift_factor=0.1, scaling_factor=1.5),
        first[1],
        first[0],
        second[1],
        second[0],
        encoder,
        tokenizer,
    ).save_pretrained(folder)
