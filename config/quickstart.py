# A small GPT on byte pairs learnt from the text, trained in under a minute on two CPU cores.
# python train.py config/quickstart.py
out_dir = 'out/quickstart'
dataset = 'shakespeare_bpe'
tokenizer = 'bpe'

n_layer = 2
n_head = 2
n_embd = 128
block_size = 48
batch_size = 32

optimizer = 'muon'
learning_rate = 1.2e-2
schedule = 'linear'
min_lr = 0.0
warmup_iters = 20
beta1 = 0.8
max_iters = 330

log_interval = 50
eval_interval = 100
checkpoint_interval = 100
eval_iters = 5
sample_interval = 150
final_eval_tokens = 44_000  # the whole validation split, and as much of the training split
