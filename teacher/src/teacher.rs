//! A teacher of any kind.

use potstill_datasets::{Answer, Prompt, Provenance, Signal};

use crate::Error;
use crate::given::GivenTeacher;
use crate::http::CollectionEnd;
use crate::http_teacher::HttpTeacher;
#[cfg(feature = "local")]
use crate::local::LocalTeacher;
use crate::protocol::{AnswerRequest, Exchange, ScoreRequest, ScoringOptions};

/// A source of answers and distributions.
#[derive(Debug)]
pub enum Teacher {
    /// A checkpoint that runs in this process.
    #[cfg(feature = "local")]
    Local(Box<LocalTeacher>),
    /// A model behind a server.
    Http(Box<HttpTeacher>),
    /// The answers that the data has.
    Given(Box<GivenTeacher>),
}

impl Teacher {
    /// Asks for an answer to each request until every request is completed.
    ///
    /// # Errors
    /// A prompt that cannot be encoded or, for a local teacher, does not fit into the context; an error of the model or
    /// of the settings; an error of the exchange's functions. Completed entries stay.
    pub fn answer(
        &self,
        exchange: Exchange<'_, AnswerRequest, Answer>,
    ) -> Result<CollectionEnd, Error> {
        match self {
            #[cfg(feature = "local")]
            Teacher::Local(local) => local.answer(exchange),
            Teacher::Http(http) => http.answer(exchange),
            Teacher::Given(given) => given.answer(exchange),
        }
    }

    /// Asks for the distributions over the answer of each request until every request is completed.
    ///
    /// # Errors
    /// As [`Teacher::answer`], and where this kind of teacher has no distributions.
    pub fn score(
        &self,
        settings: &ScoringOptions,
        exchange: Exchange<'_, ScoreRequest, Signal>,
    ) -> Result<CollectionEnd, Error> {
        match self {
            #[cfg(feature = "local")]
            Teacher::Local(local) => local.score(settings, exchange),
            Teacher::Http(http) => http.score(settings, exchange),
            Teacher::Given(_) => Err(Error::Collection {
                why: "answers of the data have no distributions\nhint: name a teacher".to_owned(),
            }),
        }
    }

    /// Adds the distributions of an answer that was stored without them, if this teacher gave them with the answer.
    ///
    /// # Errors
    /// The reason why no distributions can be made of the answer.
    pub fn complete(&self, prompt: &Prompt, answer: &mut Answer) -> Result<(), String> {
        match self {
            Teacher::Http(http) => http.complete(prompt, answer),
            _ => Ok(()),
        }
    }

    /// Provenance of this teacher's answers, for the footers of their shards.
    #[must_use]
    pub fn provenance(&self) -> Provenance {
        match self {
            #[cfg(feature = "local")]
            Teacher::Local(local) => local.provenance(),
            Teacher::Http(http) => http.provenance.clone(),
            Teacher::Given(given) => given.provenance.clone(),
        }
    }
}
