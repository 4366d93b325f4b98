r"""Training: a loop that can be cut off anywhere, diagnostics, and other people's trainers.

:func:`pyro_bayes.fit` is a plain PyTorch loop around :class:`pyro_bayes.ELBO`. The objective is a
module whose output is a loss, so any trainer does as well.

**Lightning.** The objective is what a `LightningModule` needs::

    class Module(lightning.LightningModule):
        def __init__(self, objective):
            super().__init__()
            self.objective = objective

        def training_step(self, batch, _):
            loss = self.objective(*batch)
            self.log("loss", loss)
            return loss

        def on_train_batch_end(self, *_):
            self.objective.step()  # of the divergence's weight, if it has a schedule

        def configure_optimizers(self):
            return torch.optim.Adam(self.objective.parameters(), lr=0.01)

    trainer = lightning.Trainer(max_epochs=20)
    trainer.fit(Module(objective), loader)

**Hugging Face Accelerate**, which wraps it as many processes need::

    accelerator = accelerate.Accelerator()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    for epoch in range(20):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(model(x, y))
            optimizer.step()
            objective.step()

**Many processes.** This script, run by `torchrun --nproc-per-node 2 script.py`, trains one model in
two processes. It also runs by `python script.py`, in one::

    import os

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(rank)  # each process draws its own noise
    sampler = DistributedSampler(data, num_replicas=size, rank=rank)
    loader = DataLoader(data, batch_size=50, sampler=sampler)
    fit(objective, loader, 20, optimizer=optimizer, checkpoint="run.pt", resume=True)

In a loop of one's own, `DistributedDataParallel(objective)` is all it takes. The size :math:`N` of
the whole training set stays: processes average gradients, so the divergence counts once.

**FSDP does not work.** `torch.distributed.fsdp.fully_shard` replaces parameters by shards of them,
and the model must keep the parameters that it was made of: they share storage with the posterior's
means, and draws take their places. The first call of a sharded objective raises a `RuntimeError`.
What is missing is a swap that follows parameters which come and go, and draws of sharded tensors.
"""

from pyro_bayes.training.diagnostics import Diagnosis, Row, diagnose
from pyro_bayes.training.history import History
from pyro_bayes.training.loop import fit
from pyro_bayes.training.run import Callback, State

__all__ = ["Callback", "Diagnosis", "History", "Row", "State", "diagnose", "fit"]
