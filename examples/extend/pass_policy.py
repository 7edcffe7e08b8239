"""A pass policy: sleep as many passes as the fast weights keep growing."""

from dataclasses import dataclass

from transformers import LlamaConfig, LlamaForCausalLM

from hf_sleep import PassPolicy, SleepConfig, SleepForCausalLM, register_pass_policy


@register_pass_policy("while_growing")
@dataclass(frozen=True)
class WhileGrowing(PassPolicy):
    cap: int = 4

    def another(self, number, before, after):
        grew = before is None or sum(s.norm() for s in after) > sum(s.norm() for s in before)
        return number < self.cap and bool(grew)


if __name__ == "__main__":
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    model = SleepForCausalLM.from_base(base.eval(), SleepConfig(window_size=4, sleep_passes=WhileGrowing(cap=6)))
    model.on_sleep(lambda event: print(f"row {event.row} after {event.tokens} tokens: {event.sleep_passes} passes"))
    model(base.dummy_inputs["input_ids"].repeat(1, 3))
