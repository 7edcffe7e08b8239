"""An eviction style: a sleep keeps the KV of the last few tokens, and attention sees all that is kept."""

from transformers import LlamaConfig, LlamaForCausalLM

from hf_sleep import Eviction, SleepConfig, SleepForCausalLM, register_eviction


@register_eviction("recent")
class Recent(Eviction):
    recent, span = 3, None


if __name__ == "__main__":
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    model = SleepForCausalLM.from_base(base.eval(), SleepConfig(window_size=8, eviction="recent", sleep_passes=2))
    cache = model(base.dummy_inputs["input_ids"].repeat(1, 5)).cache
    print(f"{cache.get_seq_length()} tokens read, KV of {cache.max_kv_length} held")
