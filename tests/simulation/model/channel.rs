//! An unbounded channel, with the names of `crossbeam-channel`.

use super::lock::{Condvar, Mutex};
use super::time::now;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

struct Channel<T> {
    queue: Mutex<VecDeque<T>>,
    sent: Condvar,
}

pub struct Sender<T>(Arc<Channel<T>>);
pub struct Receiver<T>(Arc<Channel<T>>);

#[derive(Debug)]
pub struct SendError;

/// As the pool's channel keeps a sender of its own, it is never disconnected.
#[derive(Debug)]
pub enum RecvTimeoutError {
    Timeout,
    Disconnected,
}

pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    let channel = Arc::new(Channel { queue: Mutex::default(), sent: Condvar::new() });
    (Sender(Arc::clone(&channel)), Receiver(channel))
}

impl<T> Sender<T> {
    pub fn send(&self, what: T) -> Result<(), SendError> {
        self.0.queue.lock().push_back(what);
        self.0.sent.notify_one();
        Ok(())
    }
}

impl<T> Receiver<T> {
    pub fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvTimeoutError> {
        let deadline = now() + timeout;
        let mut queue = self.0.queue.lock();
        loop {
            if let Some(what) = queue.pop_front() {
                return Ok(what);
            }
            let left = deadline - now();
            if left.is_zero() {
                return Err(RecvTimeoutError::Timeout);
            }
            let Ok((again, ())) = self.0.sent.wait_timeout(queue, left) else { unreachable!() };
            queue = again;
        }
    }
}
