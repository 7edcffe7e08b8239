"""A base family: Phi, whose body is Llama-shaped but for the name of its final norm."""

from transformers import PhiConfig, PhiForCausalLM

from hf_sleep import Decoder, SleepConfig, SleepForCausalLM, register_base


@register_base("phi")
class Phi(Decoder):
    @property
    def final_norm(self):
        return self.model.final_layernorm


if __name__ == "__main__":
    base = PhiForCausalLM(PhiConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2))
    model = SleepForCausalLM.from_base(base.eval(), SleepConfig(window_size=8, sleep_passes=2))
    print(model.generate(base.dummy_inputs["input_ids"], max_new_tokens=20, do_sample=False))
