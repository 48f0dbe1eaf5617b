//! A number of bios submitted together and waited for together.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use uext_blockdev::{Bio, BlkResult, BlockDevice};

struct State {
    pending: usize,
    status: Vec<BlkResult<()>>,
}

/// Bios under way, each with its own result.
pub(crate) struct BioBatch {
    state: Mutex<State>,
    done: Condvar,
}

impl BioBatch {
    /// Submits all bios, waits for all, and says how each ended, in their order.
    pub(crate) fn submit_and_wait(dev: &dyn BlockDevice, mut bios: Vec<Bio>) -> Vec<BlkResult<()>> {
        let state = State { pending: bios.len(), status: vec![Ok(()); bios.len()] };
        let batch = Arc::new(Self { state: Mutex::new(state), done: Condvar::new() });
        for (index, bio) in bios.iter_mut().enumerate() {
            let batch = batch.clone();
            bio.set_end_io(move |bio| {
                let status = bio.status();
                // The memory must be free before the waiter goes on to reuse it.
                drop(bio);
                batch.end(index, status);
            });
        }
        dev.submit_bios(bios);
        let mut state = batch.state.lock();
        while state.pending > 0 {
            batch.done.wait(&mut state);
        }
        std::mem::take(&mut state.status)
    }

    fn end(&self, index: usize, status: BlkResult<()>) {
        let mut state = self.state.lock();
        state.status[index] = status;
        state.pending -= 1;
        if state.pending == 0 {
            self.done.notify_one();
        }
    }
}
