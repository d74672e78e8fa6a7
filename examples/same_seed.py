"""The contract: one seed, one text, however it is decoded: python examples/same_seed.py [CHECKPOINT]"""

import sys

import tidar

model = tidar.load(*sys.argv[1:2], dtype="float64")
params = tidar.SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_new_tokens=48)
prompt = "def read(path):\n"

[ar] = model.generate(prompt, params, method="ar")
print(prompt + ar.text)
for draft_len, proposals in ((2, None), (4, None), (4, 2), (8, 3)):
    [answer] = model.generate(prompt, params, draft_len=draft_len, proposals=proposals)
    assert answer.token_ids == ar.token_ids
    print(f"# draft length {draft_len}, proposals {proposals}: the same, {answer.forwards} forwards, not {ar.forwards}")
