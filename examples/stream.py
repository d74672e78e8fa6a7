"""Print text as it comes, what one forward made between bars: python examples/stream.py [CHECKPOINT]"""

import sys

import tidar

model = tidar.load(*sys.argv[1:2])
prompt = "class Stack:\n    def push(self, item):\n"
print(prompt, end="")
for chunk in model.stream(prompt, tidar.SamplingParams(max_new_tokens=48)):
    print(chunk.text, end="|", flush=True)
print(f"\n# ended by {chunk.finish_reason}")
