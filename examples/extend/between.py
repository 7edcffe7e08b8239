"""A step between two passes: the next one reads the mean of what the last one wrote and of what pass 1 read."""

from transformers import LlamaConfig, LlamaForCausalLM

from hf_sleep import Between, SleepConfig, SleepForCausalLM, register_between


@register_between("mean")
class Mean(Between):
    needs_loop_input = True

    def forward(self, z, e):
        return (z + e) / 2


if __name__ == "__main__":
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    model = SleepForCausalLM.from_base(base.eval(), SleepConfig(window_size=4, between="mean", sleep_passes=3))
    print(model(base.dummy_inputs["input_ids"].repeat(1, 3)).logits.shape)
