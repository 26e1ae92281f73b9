# A text of your own, of 100 kB to 100 MB: learns a vocabulary, chooses the model by the text's size, stops
# when the validation loss no longer falls, and keeps the best weights in model.pt. Trains for up to nine
# minutes on two CPU cores. For a better model, on more time or a GPU, add
# --max_iters=10000 --n_layer=6 --n_embd=384 --block_size=256
# python train.py config/mine.py --input=my.txt
# A second text needs its own folders: add --dataset=NAME --out_dir=out/NAME
out_dir = 'out/mine'
dataset = 'mine'
tokenizer = 'bpe'

n_layer = 0  # 0: chosen by train.py from the number of training tokens, and so are dropout and weight_decay
n_head = 0
n_embd = 0
block_size = 0
max_iters = 0
batch_size = 32

optimizer = 'muon'
learning_rate = 8e-3
schedule = 'linear'
min_lr = 0.0
warmup_iters = 20
beta1 = 0.8

patience = 5
log_interval = 50
eval_interval = 100
checkpoint_interval = 100
eval_iters = 10
sample_interval = 500
final_eval_tokens = 100_000
