set -x
export PYTHONUNBUFFERED=1
W=/tmp/w; mkdir -p $W; R=$PWD; cd $W
time timeout 240 python3 $R/runs/corpus.py --out $W/corpus --vocab 4096 > $OUT/corpus.log 2>&1; tail -12 $OUT/corpus.log
gzip -c corpus/holdout/files.jsonl > $OUT/holdout.jsonl.gz; cp corpus/stats.json corpus/licences.json corpus/tokenizer/tokenizer.json corpus/tokenizer/tokenizer_config.json $OUT/
time timeout 150 python3 $R/runs/train_speed.py --seq-len 2048 --seconds 5 --layers 10 2>&1 | tail -20
time timeout 120 python3 $R/runs/train.py python-17m-ar --set out=$W/p/ar --set tokens=50_000_000 --set eval_every=1000 --set save_every=0 --set log_every=50 2>&1 | tail -20
time timeout 120 python3 $R/runs/train.py python-17m --set model=$W/p/ar/model --set out=$W/p/td --set tokens=30_000_000 --set eval_every=1000 --set save_every=0 --set log_every=50 2>&1 | tail -20
