# How fast this machine trains GPT-2 small: tokens/s, MFU and peak memory, in under a minute.
# Writes nothing to out/.
# python train.py config/bench.py
# python train.py config/bench.py --batch_size=32 --seq_len=1024 --block_size=1024
out_dir = ''
dataset = 'shakespeare'
tokenizer = 'gpt2'

batch_size = 8
seq_len = 256

warmup_iters = 0
max_iters = 200
max_minutes = 0.4
log_interval = 1
eval_interval = 0
sample_interval = 0
checkpoint_interval = 0
final_eval_tokens = 2
measure_peak = True  # for MFU on a chip whose peak FLOP/s train.py does not list
