"""The configuration of an exported Tessera model: the keys of its YAML under `model` and `attention`, and what transformers asks of every model."""

from transformers import PretrainedConfig


class TesseraConfig(PretrainedConfig):
    model_type = "tessera"

    def __init__(
        self,
        vocab_size=257,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        mlp_ratio=4,  # hidden size of the MLP, in widths
        positions="rotary",  # learned | rotary
        rotary_base=10000.0,
        norm="rmsnorm",  # layernorm | rmsnorm
        norm_epsilon=1e-5,
        bias=False,
        attention=None,  # score, gate, normalizer, threshold, pattern, ...: as in the YAML
        block_masks=None,  # contents of the masks that patterns `blocks` name: {sha256: {"block": tokens a side, "rows": ["1", "01", ...]}}
        end_of_text_id=256,  # where document_mask begins a document
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.mlp_ratio = mlp_ratio
        self.positions = positions
        self.rotary_base = rotary_base
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.bias = bias
        self.attention = attention or {}
        self.block_masks = block_masks or {}
        self.end_of_text_id = end_of_text_id
        super().__init__(**kwargs)
