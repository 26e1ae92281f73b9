# A small GPT on characters, beside the quickstart: trained in under a minute on two CPU cores.
# python train.py config/quickstart_char.py
out_dir = 'out/quickstart_char'
dataset = 'shakespeare_char'
tokenizer = 'char'

n_layer = 3
n_head = 2
n_embd = 128
block_size = 64
batch_size = 24

optimizer = 'muon'
learning_rate = 1.2e-2
schedule = 'linear'
min_lr = 0.0
warmup_iters = 20
beta1 = 0.8
max_iters = 350

log_interval = 50
eval_interval = 100
checkpoint_interval = 100
eval_iters = 5
sample_interval = 150
final_eval_tokens = 111_540  # the whole validation split, and as much of the training split
