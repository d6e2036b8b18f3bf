//! [`Permit`]: what a job has its slot with. No path of a job, panics included, can forget to free the slot.

use crate::leaf::clock::Moment;
use crate::ledger::{OpenError, Token};
use crate::manage::Manage;
use crate::runtime::shared::{PoolConn, PoolLedger, Shared};
use crate::stats::CloseReason;
use std::sync::Arc;

/// The slot of a job. The drop of a permit frees the slot. It takes the ledger's lock, so no permit is dropped under
/// that lock.
pub(crate) struct Permit<M: Manage> {
    shared: Arc<Shared<M>>,
    /// `None` once the token was passed to the ledger.
    token: Option<Token>,
}

/// The permit and connection of a job that was abandoned, which the ledger did not take.
pub(crate) type Late<M> = (Permit<M>, Box<PoolConn<M>>);

impl<M: Manage> Permit<M> {
    pub(crate) fn new(shared: Arc<Shared<M>>, token: Token) -> Self {
        Permit { shared, token: Some(token) }
    }

    /// The number of the connection.
    pub(crate) fn id(&self) -> u64 {
        self.token.as_ref().map_or(0, Token::id)
    }

    /// The job starts: its limit counts from now. `None`: the job is an open that is no longer wanted.
    pub(crate) fn begin(mut self) -> Option<Self> {
        let token = self.token.take()?;
        let shared = Arc::clone(&self.shared);
        let (now, jitter) = (shared.time.precise(), shared.jitter());
        let token = shared.with(|l| l.begin(now, token, jitter))?;
        Some(Permit::new(shared, token))
    }

    /// The close begins. It has a limit of its own, unless the job was abandoned before.
    pub(crate) fn begin_close(&self) {
        if let Some(token) = &self.token {
            let now = self.shared.time.precise();
            self.shared.with(|l| l.begin_close(now, token));
        }
    }

    /// The job has succeeded: passes slot and connection to the ledger. `Err`: the job was abandoned meanwhile, so it
    /// keeps both.
    pub(crate) fn report_success<R: Default>(
        mut self,
        to: impl FnOnce(&mut PoolLedger<M>, Moment, Token) -> Result<R, (Token, Box<PoolConn<M>>)>,
    ) -> Result<R, Late<M>> {
        let Some(token) = self.token.take() else { return Ok(R::default()) };
        let shared = Arc::clone(&self.shared);
        let now = shared.time.precise();
        shared.with(|l| to(l, now, token)).map_err(|(token, conn)| (Permit::new(shared, token), conn))
    }

    /// The open has failed.
    pub(crate) fn report_open_failed(&self, error: OpenError) {
        if let Some(token) = &self.token {
            let (now, jitter) = (self.shared.time.precise(), self.shared.jitter());
            self.shared.with(|l| l.open_failed(now, token, error, jitter));
        }
    }

    /// The check or the reset has failed.
    pub(crate) fn report_check_failed(&self, reason: CloseReason) {
        if let Some(token) = &self.token {
            let now = self.shared.time.precise();
            self.shared.with(|l| l.check_failed(now, token, reason));
        }
    }

    /// The token, for the job that closes the connection.
    pub(crate) fn into_token(mut self) -> Option<Token> {
        self.token.take()
    }
}

impl<M: Manage> Drop for Permit<M> {
    fn drop(&mut self) {
        let Some(token) = self.token.take() else { return };
        let now = self.shared.time.precise();
        self.shared.with(|l| l.free(now, token));
    }
}
