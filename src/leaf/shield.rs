//! The panic shield: how the pool calls code that is not its own.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The message of a panic in code that is not the pool's.
#[derive(Debug)]
pub(crate) struct Panic(String);

impl Panic {
    /// The panic with this payload, which is dropped.
    #[cold]
    fn of(payload: Box<dyn Any + Send>) -> Panic {
        let text = panic_text(&*payload).to_owned();
        drop_payload(payload);
        Panic(text)
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "panicked: {}", self.0)
    }
}

/// Runs code that is not the pool's, and catches its panic.
#[inline]
pub(crate) fn catch<R>(code: impl FnOnce() -> R) -> Result<R, Panic> {
    // Unwind safe: what the code may leave half done is a connection, which is then closed, or belongs to the manager.
    catch_unwind(AssertUnwindSafe(code)).map_err(Panic::of)
}

/// [`catch`], where a panic has no further consequence.
pub(crate) fn shielded(code: impl FnOnce()) {
    let _ = catch(code);
}

pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> &str {
    match payload.downcast_ref::<&str>() {
        Some(text) => text,
        None => payload.downcast_ref::<String>().map_or("(no message)", String::as_str),
    }
}

/// Drops the payload of a panic. Its drop may panic as well, and so on for ever: the second payload is leaked.
pub(crate) fn drop_payload(payload: Box<dyn Any + Send>) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(second);
    }
}

/// Something of the user's whose drop may panic, such as the manager. The panic is caught, since the drop runs on
/// whatever thread has the pool last.
pub(crate) struct Shielded<T>(Option<T>);

impl<T> Shielded<T> {
    pub(crate) fn new(what: T) -> Self {
        Shielded(Some(what))
    }
}

impl<T> Deref for Shielded<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl<T> Drop for Shielded<T> {
    fn drop(&mut self) {
        let what = self.0.take();
        shielded(|| drop(what));
    }
}
