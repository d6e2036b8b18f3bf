// What the examples in the documentation, which include this file, and some unit tests pool.

use std::convert::Infallible;
use std::time::Duration;

/// A manager whose connections are nothing.
#[derive(Debug)]
pub(crate) struct DocManager;

impl millpond::Manage for DocManager {
    type Connection = ();
    type Error = Infallible;

    fn open(&self, _: &millpond::Opening) -> Result<(), Infallible> {
        Ok(())
    }

    fn validate(&self, _: &mut (), _: Duration) -> Result<(), Infallible> {
        Ok(())
    }

    fn returned(&self, _: &mut ()) -> millpond::Returned {
        millpond::Returned::Keep
    }
}
